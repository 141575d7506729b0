"""The model card, read back with the Hub's own parser."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from llmcompress.export.card import model_card
from llmcompress.report import BlockReport, MatrixReport, Report


def report(bits: float = 8.0, sparsity: float = 0.5) -> Report:
    blocks = [BlockReport("h.0", matrices=[MatrixReport("h.0.fc", (4, 4), sparsity, bits)])]
    calibration = {"source": "/home/me/books.txt", "samples": 4, "length": 8}
    return Report("owner/model", "jsq", blocks=blocks, calibration=calibration, kl_divergence=0.08314)


def test_the_card_says_what_was_done_and_what_it_cost() -> None:
    card = ModelCard(model_card(report(), "name: jsq\n", "owner/model"))
    assert card.data.base_model == "owner/model" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and "compressed-tensors" in card.data.tags
    assert "0.08314" in card.text and "50.0%" in card.text and "```yaml\nname: jsq\n```" in card.text


def test_the_licence_is_that_of_the_base_model_or_left_out(tmp_path: Path) -> None:
    assert ModelCard(model_card(report(), "", "owner/model", tmp_path)).data.license is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\ntags: [a]\n---\n# text\n")
    card = ModelCard(model_card(report(), "", "owner/model", tmp_path))
    assert card.data.license == "apache-2.0" and card.data.language == "en" and "a" not in card.data.tags
    (tmp_path / "README.md").write_text("no metadata\n")
    assert ModelCard(model_card(report(), "", "owner/model", tmp_path)).data.license is None


def test_paths_of_this_machine_stay_out(tmp_path: Path) -> None:
    text = model_card(report(), "", str(tmp_path))
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text and "/home/me" not in text


def test_limits_fit_what_was_done() -> None:
    pruned, quantized = model_card(report(bits=16.0), "", "o/m"), model_card(report(sparsity=0.0), "", "o/m")
    assert (
        "no speed on a CPU" in pruned and "integer" not in pruned and "compressed-tensors" not in pruned.split("# ")[0]
    )
    assert "no speed on a CPU" not in quantized and "integer" in quantized
