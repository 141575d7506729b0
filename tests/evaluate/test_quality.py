"""Figures of a text against transformers in float64, torch.distributions, and counts by hand."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import api
from llmcompress.errors import UserError
from llmcompress.evaluate import judged, predictions
from llmcompress.evaluate.quality import TextQuality
from llmcompress.evaluate.result import Evaluation
from tests.architectures import tiny_folder

PREFIX = 1  # </s>, as the tokenizer of the checkpoint has no begin of sequence


@pytest.fixture(scope="module")
def other(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with other weights and the same tokenizer."""
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "other", seed=1)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def evaluated(model: Path, reference: Path | None = None, *texts: Path, **options: object) -> Evaluation:
    given = api.EvalOptions(texts=tuple(map(str, texts)), **options)  # type: ignore[arg-type]
    return api.evaluate(model, reference, given)


def double_logs(folder: Path, text: Path, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """(tokens, V) float64 log-probabilities by one plain forward per token, and the (tokens,) tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    stream = torch.cat([torch.tensor([PREFIX]), tokens])
    logs = []
    for place in range(len(tokens)):
        windows = max(0, -(-(place + 1 - length) // stride))  # full windows after the first that the token needs
        end = min(length + windows * stride, len(tokens))
        begin = max(0, end - length)
        with torch.no_grad():
            logs.append(model(stream[None, begin : place + 1]).logits[0, -1].log_softmax(-1))
    return torch.stack(logs), tokens


@pytest.fixture
def short(tmp_path: Path, text: Path) -> Path:
    file = tmp_path / "short.txt"
    file.write_text(" ".join(text.read_text().split()[:57]), encoding="utf-8")
    return file


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (64, 64)])
def test_perplexity_is_that_of_a_plain_computation_in_float64(
    checkpoint: Path, short: Path, length: int, stride: int
) -> None:
    logs, tokens = double_logs(checkpoint, short, length, stride)
    loss = -logs.gather(1, tokens[:, None]).sum().item()
    found = evaluated(checkpoint, None, short, length=length, stride=stride).texts[0]
    words, size = len(re.split(r"\s+", short.read_text())), short.stat().st_size
    assert found.tokens == len(tokens)
    assert found.perplexity.token.value == pytest.approx(math.exp(loss / len(tokens)), rel=1e-5)
    assert found.perplexity.word is not None and found.perplexity.byte is not None
    assert found.perplexity.word.value == pytest.approx(math.exp(loss / words), rel=1e-5)
    assert found.perplexity.byte.value == pytest.approx(math.exp(loss / size), rel=1e-5)
    assert found.perplexity.bits_per_byte == pytest.approx(loss / size / math.log(2), rel=1e-5)


def test_divergence_and_agreement_are_their_definitions(
    checkpoint: Path, other: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_CHUNK_ELEMENTS", 7 * 96)
    (p, _), (q, _) = (double_logs(folder, short, 16, 16) for folder in (checkpoint, other))
    found = evaluated(other, checkpoint, short, length=16).texts[0]
    kl = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean().item()
    five = [set(x.topk(5).indices.tolist()) for x in p], [set(x.topk(5).indices.tolist()) for x in q]
    overlap = sum(len(a & b) for a, b in zip(*five, strict=True)) / 5 / len(p)
    assert found.beside is not None
    assert found.beside.kl.value == pytest.approx(kl, rel=1e-5)
    assert found.beside.top1.value == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert found.beside.top5.value == pytest.approx(overlap)


def test_a_model_beside_itself_differs_in_nothing(checkpoint: Path, text: Path) -> None:
    found = evaluated(checkpoint, checkpoint, text, length=32).texts[0].beside
    assert found is not None
    assert found.kl.value == 0 and found.top1.value == found.top5.value == found.ratio.value == found.p == 1
    assert found.verdict == "within noise"


def test_other_weights_are_worse_or_better_by_the_test(checkpoint: Path, other: Path, text: Path) -> None:
    there, back = (
        evaluated(a, b, text, length=32).texts[0].beside for a, b in ((checkpoint, other), (other, checkpoint))
    )
    assert there is not None and back is not None
    assert there.ratio.value == pytest.approx(1 / back.ratio.value)
    assert {there.verdict, back.verdict} in ({"worse", "better"}, {"within noise"})
    assert there.ratio.low is not None and there.ratio.high is not None
    assert there.ratio.low < there.ratio.value < there.ratio.high
    assert (there.ratio.low <= 1 <= there.ratio.high) == (there.verdict == "within noise")


@pytest.mark.parametrize("parts", ["by_context", "by_frequency"])
def test_the_parts_of_a_breakdown_make_up_the_whole(checkpoint: Path, other: Path, tmp_path: Path, parts: str) -> None:
    file = tmp_path / "uneven.txt"
    file.write_text(" ".join(f"w{int(92 * (i / 400) ** 4)}" for i in range(400)), encoding="utf-8")
    found = evaluated(other, checkpoint, file, length=64).texts[0]
    rows = getattr(found, parts)
    assert len(rows) > 1 and sum(row.tokens for row in rows) == found.tokens
    loss = sum(row.tokens * math.log(row.perplexity) for row in rows) / found.tokens
    assert math.exp(loss) == pytest.approx(found.perplexity.token.value)
    assert found.beside is not None
    assert sum(row.tokens * row.kl for row in rows) / found.tokens == pytest.approx(found.beside.kl.value)


def test_frequent_tokens_are_counted_in_the_text(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "counted.txt"
    file.write_text(" ".join(["w1"] * 150 + ["w2"] * 1 + ["w3"] * 49), encoding="utf-8")
    rows = evaluated(checkpoint, None, file, length=64).texts[0].by_frequency
    assert [(row.name, row.tokens) for row in rows] == [("1 % of the text or more", 199), ("0.1 % to 1 %", 1)]


def test_memory_for_few_tokens_gives_the_same_figures(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(checkpoint, None, text, length=16).texts[0]
    monkeypatch.setattr(judged, "_LIVE_BYTES", 1)
    assert evaluated(checkpoint, None, text, length=16).texts[0] == whole


def test_documents_are_read_one_by_one_and_resampled_if_there_are_enough(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(25)), encoding="utf-8")
    found = evaluated(checkpoint, None, file, length=16).texts[0]
    assert (found.documents, found.windows, found.tokens, found.words) == (25, 25, 75, 75)
    assert found.unit == "document" and found.perplexity.token.low is not None


def test_the_same_seed_gives_the_same_result_and_another_only_other_intervals(checkpoint: Path, text: Path) -> None:
    def figures(seed: int) -> TextQuality:
        return evaluated(checkpoint, None, text, length=16, seed=seed).texts[0]

    first, again, another = figures(0), figures(0), figures(1)
    assert first == again
    assert first.perplexity.token.value == another.perplexity.token.value
    assert first.perplexity.token.low != another.perplexity.token.low


def test_a_limited_text_says_nothing_about_its_words(checkpoint: Path, text: Path) -> None:
    found = evaluated(checkpoint, None, text, length=16, limit=3)
    assert found.texts[0].windows == 3 and found.texts[0].tokens == 48
    assert found.texts[0].perplexity.word is None and "limited" in found.table()


def test_the_result_says_what_it_was_measured_with(checkpoint: Path, text: Path) -> None:
    found = json.loads(evaluated(checkpoint, checkpoint, text, length=16).to_json())
    assert found["texts"][0]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert found["model"]["sha256"]["model.safetensors"] == found["reference"]["sha256"]["model.safetensors"] == weights
    assert found["versions"].keys() >= {"python", "torch", "transformers"} and found["options"]["seed"] == 0
    assert found["windowing"] == "rolling window of 16 tokens, stride 16, prefix </s>"


def test_a_broken_model_has_a_figure_and_strict_json(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    folder = tiny_folder(tmp_path / "broken")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(folder)
    found = evaluated(folder, checkpoint, text, length=16)
    assert found.texts[0].perplexity.token.value == math.inf
    assert json.loads(found.to_json())["texts"][0]["perplexity"]["token"]["value"] is None
    assert "inf" in found.table()


def test_a_reference_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    folder = tiny_folder(tmp_path / "wide", vocab_size=97)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    with pytest.raises(UserError, match="predicts 97 tokens"):
        evaluated(checkpoint, folder, text, length=16)
    folder = tiny_folder(tmp_path / "renamed")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w92"', '"x92"'))
    with pytest.raises(UserError, match="its tokenizer knows other tokens"):
        evaluated(checkpoint, folder, text, length=16)
