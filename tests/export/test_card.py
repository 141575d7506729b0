"""The model card, read back with the Hub's own parser."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmcompress.export.card import metrics, model_card
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


def evaluated() -> Report:
    found = report()
    found.perplexity = {"before": 50.25, "after": 61.5}
    found.kl_stderr, found.top1_agreement = 0.001, 0.75
    found.evaluation = {"source": "texts/wiki.txt", "samples": 16, "length": 8, "seed": 3}
    found.output = "/home/me/compressed/model-jsq"
    return found


def test_the_figures_are_the_hubs_model_index_and_read_back_as_they_were() -> None:
    found = evaluated()
    card = ModelCard(model_card(found, "", "owner/model"))
    results = card.data.eval_results
    assert {r.metric_type: r.metric_value for r in results} == metrics(found)
    assert metrics(found) == {"perplexity": 61.5, "kl_divergence": 0.08314, "top1_agreement": 0.75}
    assert card.data.model_name == "model-jsq"
    for result in results:
        assert isinstance(result, EvalResult) and (result.task_type, result.dataset_name) == (
            "text-generation",
            "wiki.txt",
        )
        assert result.dataset_args == {"samples": 16, "length": 8, "seed": 3}
    again = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == card.data.to_dict()


def test_the_metadata_has_the_types_the_hub_asks_for() -> None:
    content = yaml.safe_load(model_card(evaluated(), "", "owner/model").split("---\n")[1])
    words = ("base_model", "base_model_relation", "library_name", "pipeline_tag")
    assert all(isinstance(content[key], str) for key in words)
    assert content["base_model_relation"] in ("quantized", "finetune", "adapter", "merge")
    assert all(isinstance(tag, str) for tag in content["tags"])
    (index,) = content["model-index"]
    (result,) = index["results"]
    assert isinstance(index["name"], str) and set(result) == {"task", "dataset", "metrics"}
    assert all(isinstance(m["type"], str) and isinstance(m["value"], float) for m in result["metrics"])


def test_data_are_named_with_rows_and_tokens() -> None:
    text = model_card(evaluated(), "", "owner/model")
    assert "| calibration | `books.txt` | 4 | 8 | 32 |" in text
    assert "| evaluation | `wiki.txt` | 16 | 8 | 128 | 3 |" in text
    found = evaluated()
    found.calibration["source"] = "owner/texts:train"
    assert ModelCard(model_card(found, "", "owner/model")).data.datasets == ["owner/texts"]
    found.calibration["source"] = "self"
    assert ModelCard(model_card(found, "", "owner/model")).data.datasets is None


def test_a_preset_of_the_hub_is_named_as_the_hub_does_and_a_bundled_one_is_not() -> None:
    assert ModelCard(model_card(report(), "", "qwen3-0.6b")).data.base_model == "Qwen/Qwen3-0.6B"
    assert ModelCard(model_card(report(), "", "llama")).data.base_model is None
    pruned = ModelCard(model_card(report(bits=16.0), "", "owner/model")).data
    assert pruned.base_model == "owner/model" and pruned.get("base_model_relation") is None


def test_a_licence_text_is_linked_and_odd_metadata_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("terms")
    data = ModelCard(model_card(report(), "", "owner/model", tmp_path)).data
    assert (data.license, data.license_link) == ("other", "LICENSE.txt")
    (tmp_path / "README.md").write_text("---\nlicense: {a: [b]}\nlanguage: [en, 3]\n---\n")
    data = ModelCard(model_card(report(), "", "owner/model", tmp_path)).data
    assert data.license == "other" and data.language is None


def test_what_went_less_well_is_said() -> None:
    found = report()
    found.warnings = ["h.0.fc: left dense, no calibration token reached it"]
    assert "- h.0.fc: left dense" in model_card(found, "", "o/m")
