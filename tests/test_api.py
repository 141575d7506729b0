"""One run, held to what it leaves: the same bytes for the same seed, a folder that others load to what we read from it,
records that are true, and an input that is never touched."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import Recipe, api, compress, load
from llmcompress.evaluate.stream import rounded_activations
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.report import Report
from llmcompress.sampling import self_samples
from llmcompress.suspend import gates
from tests.architectures import tiny_folder

TOKENS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))
W4 = {"stages": [{"quantize": {"weights": "int4-g8"}}]}
RECIPES = {"wanda-2of4": Recipe.load("wanda-2of4"), "jsq": Recipe.load("jsq"), "w4a16": Recipe.from_tree(W4, "w4a16")}


def options(**given: Any) -> api.Options:
    return api.Options(**{"samples": 4, "length": 16, "evaluate": False} | given)


def contents(folder: Path) -> dict[str, str]:
    """Hash by name of everything in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def streamed_logits(folder: Path) -> Tensor:
    """What our own block-wise reading of a folder computes on TOKENS, (3, 12, 96)."""
    model = BlockwiseModel(Checkpoint(folder), torch.float32)
    with gates([block.module for block in model.blocks]):
        (forward,) = model.start_forwards([TOKENS], head=True)
        for index in range(len(model.blocks)):
            model.load_block(index)
            with rounded_activations(model):
                forward.resume()
    return forward.result


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    model(tokens)  # transformers unpacks quantized weights in a first forward that does not yet round the inputs
    return model(tokens).logits


@pytest.fixture(scope="session")
def finished(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny Llama compressed by one of RECIPES, judged on a text; each is made once."""
    folder = tmp_path_factory.mktemp("finished")

    def finished(name: str) -> Path:
        if not (folder / name).exists():
            judged = options(calibration=str(text), evaluate=True, eval_text=str(text))
            compress(checkpoint, RECIPES[name], folder / name, judged)
        return folder / name

    return finished


# --- what others load ---


RELOADED = [(model_type, recipe) for model_type in ("llama", "gemma2", "gpt2") for recipe in RECIPES]
RELOADED += [(model_type, "jsq") for model_type in ("qwen3", "gpt_neox", "phi3", "falcon")]
RELOADED += [("opt", "w4a16")]


@pytest.mark.parametrize(("model_type", "recipe"), RELOADED)
def test_the_saved_folder_reloads_to_the_logits_that_were_judged(model_type: str, recipe: str, tmp_path: Path) -> None:
    compress(tiny_folder(tmp_path / "dense", model_type), RECIPES[recipe], tmp_path / "out", options())
    reloads_alike(tmp_path / "out")
    assert not torch.allclose(streamed_logits(tmp_path / "out"), streamed_logits(tmp_path / "dense"), atol=1e-3)


def reloads_alike(folder: Path) -> None:
    """Kernels that multiply integers round otherwise, now and then: tests/runtime has their laws."""
    expected = streamed_logits(folder)
    for model in (AutoModelForCausalLM.from_pretrained(folder).eval(), load(folder, runtime="dense")):
        torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_matrices_that_read_rows_without_a_batch_are_the_one_exception(tmp_path: Path) -> None:
    """OPT's MLP: transformers rounds such rows with one scale for all of them, this program with one for each."""
    source = tiny_folder(tmp_path / "dense", "opt")
    compress(source, replace(RECIPES["jsq"], exclude=("*.fc1", "*.fc2")), tmp_path / "attention", options())
    reloads_alike(tmp_path / "attention")
    compress(source, replace(RECIPES["jsq"], include=("*.fc1", "*.fc2")), tmp_path / "mlp", options())
    with pytest.raises(AssertionError, match="not close"):
        reloads_alike(tmp_path / "mlp")


def test_codes_that_transformers_cannot_unpack_take_a_byte_each(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", "falcon")
    report = compress(source, RECIPES["w4a16"], tmp_path / "bytes", options())
    assert any("take 8 bits each on disk, since transformers cannot load packed" in w for w in report.warnings)
    reloads_alike(tmp_path / "bytes")
    compress(source, Recipe.from_tree(W4, "w4a8", ["quantize.activations=int8"]), tmp_path / "out", options())
    reloads_alike(tmp_path / "out")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_saved_folder_generates(finished: Callable[[str], Path], recipe: str) -> None:
    folder = finished(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert ids.tolist() == [[4, 5, 6]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, logits(load(folder), ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_written_tensors_have_the_names_of_the_input(recipe: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", tie_word_embeddings=tied)
    compress(source, RECIPES[recipe], tmp_path / "out", options())
    before, after = set(tensors(source)), set(tensors(tmp_path / "out"))
    matrices = {name for name in before if name.endswith("_proj.weight")}
    suffixes = {"wanda-2of4": ["weight"], "jsq": ["weight", "weight_scale"]}
    own = suffixes.get(recipe, ["weight_packed", "weight_scale", "weight_shape"])
    assert len(matrices) == 14 and ("lm_head.weight" in before) != tied
    assert after == before - matrices | {name.removesuffix("weight") + s for name in matrices for s in own}
    reloads_alike(tmp_path / "out")


def test_what_is_not_compressed_keeps_its_bytes(checkpoint: Path, finished: Callable[[str], Path]) -> None:
    before, after = tensors(checkpoint), tensors(finished("w4a16"))
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name])
    assert len(before.keys() & after.keys()) == len(before) - 14


def test_a_bfloat16_checkpoint_stays_in_bfloat16(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", dtype=torch.bfloat16)
    report = compress(source, "jsq", tmp_path / "out", options())
    found = tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16, torch.int8}
    assert report.size_bytes["after"] == sum(t.nbytes for t in found.values())
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    expected = streamed_logits(tmp_path / "out")  # in float32, from the same stored numbers
    torch.testing.assert_close(
        logits(load(tmp_path / "out", torch.float32, runtime="dense"), TOKENS), expected, rtol=1e-3, atol=1e-3
    )


# --- the same again ---


def test_same_seed_same_bytes_and_another_seed_others(checkpoint: Path, tmp_path: Path) -> None:
    runs = {"one": 0, "two": 0, "other": 1}
    found = {}
    for name, seed in runs.items():
        compress(checkpoint, "jsq", tmp_path / name / "out", options(seed=seed, evaluate=True))
        found[name] = contents(tmp_path / name / "out")
        report = json.loads((tmp_path / name / "out" / "report.json").read_text())
        found[name] |= {"report.json": str(without_measurements(report)), "report.html": "shows the report's seconds"}
    assert found["one"].keys() == found["two"].keys() == found["other"].keys()
    assert found["one"] == found["two"]
    weights = [name for name in found["one"] if name.endswith(".safetensors")]
    assert any(found["one"][name] != found["other"][name] for name in weights)


def without_measurements(report: dict[str, Any]) -> dict[str, Any]:
    """A report less its seconds, bytes of memory and folder."""
    for block in report["blocks"]:
        del block["seconds"], block["peak_memory_bytes"]
    return {k: v for k, v in report.items() if k not in ("seconds", "seconds_by_phase", "peak_memory_bytes", "output")}


def test_low_memory_gives_the_same_bytes_and_shards_the_same_tensors(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(sharded, max_shard_size="30KB")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, source, low_memory in [("plain", checkpoint, False), ("low", checkpoint, True), ("cut", sharded, False)]:
        given = options(calibration=str(text), low_memory=low_memory)
        compress(source, "jsq", tmp_path / name / "out", given)
    plain, low = (contents(tmp_path / name / "out") for name in ("plain", "low"))
    assert plain.keys() == low.keys()
    assert {name for name in plain if plain[name] != low[name]} <= {"report.json", "report.html"}
    whole, cut = (tensors(tmp_path / name / "out") for name in ("plain", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_documents_give_what_their_text_gives(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """600 words in one document: only the end of sequence after it differs, which is not reached."""
    lines = tmp_path / "documents.jsonl"
    lines.write_text(json.dumps({"text": text.read_text()}))
    found = []
    for file in (text, lines):
        compress(checkpoint, "wanda-2of4", tmp_path / file.suffix / "out", options(calibration=str(file)))
        found.append(tensors(tmp_path / file.suffix / "out"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_input_is_never_changed(checkpoint: Path, tmp_path: Path) -> None:
    before = contents(checkpoint)
    for name, recipe in RECIPES.items():
        compress(checkpoint, recipe, tmp_path / name, options())
    assert contents(checkpoint) == before


# --- what is recorded ---


def test_the_report_has_every_figure(checkpoint: Path, finished: Callable[[str], Path], text: Path) -> None:
    report = json.loads((finished("jsq") / "report.json").read_text())
    required = "model recipe seed versions seconds seconds_by_phase peak_memory_bytes size_bytes effective_bits"
    required += " sparsity perplexity kl_divergence top1_agreement calibration blocks warnings"
    assert set(required.split()) <= report.keys()
    assert (report["model"], report["recipe"], report["seed"]) == (str(checkpoint), "jsq", 0)
    assert report["versions"]["torch"] == torch.__version__
    assert sum(report["seconds_by_phase"].values()) <= report["seconds"] * 1.001
    assert all(seconds >= 0 for seconds in report["seconds_by_phase"].values())
    assert report["peak_memory_bytes"] > 10**8
    assert {"source": str(text), "samples": 4, "length": 16}.items() <= report["calibration"].items()
    assert report["evaluation"]["source"] == str(text)
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    for block in report["blocks"]:
        assert block["seconds"] > 0 and len(block["matrices"]) == 7
        for matrix in block["matrices"]:
            assert 0 < matrix["relative_error"] < 1
    assert report["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert 1 < report["perplexity"]["before"] < math.inf and 1 < report["perplexity"]["after"] < math.inf
    assert report["kl_divergence"] > 0 and 0 < report["top1_agreement"] <= 1
    assert Report.from_json((finished("jsq") / "report.json").read_text()).recipe == "jsq"


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_and_bits_are_those_of_the_files(checkpoint: Path, finished: Callable[[str], Path], recipe: str) -> None:
    report = json.loads((finished(recipe) / "report.json").read_text())
    before, after = tensors(checkpoint), tensors(finished(recipe))
    assert report["size_bytes"] == {
        "before": sum(t.nbytes for t in before.values()), "after": sum(t.nbytes for t in after.values())
    }  # fmt: skip
    shapes = [name for name in after if name.endswith("weight_shape")]  # not a part of any weight
    bits = 8 * sum(t.nbytes for n, t in after.items() if "_proj." in n and n not in shapes)
    weights = sum(t.numel() for n, t in before.items() if "_proj." in n)
    assert report["effective_bits"] == pytest.approx(bits / weights)


@pytest.mark.parametrize("recipe", ["wanda-2of4", "jsq"])
def test_zeros_are_where_the_record_says_and_as_many(finished: Callable[[str], Path], recipe: str) -> None:
    folder = finished(recipe)
    record = json.loads((folder / "llmcompress.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    found = tensors(folder)
    in_report = {m["name"]: m for block in report["blocks"] for m in block["matrices"]}
    assert record["pattern"] == {"wanda-2of4": "2:4", "jsq": "0.5"}[recipe]
    assert len(record["matrices"]) == 14 and record["matrices"].keys() == in_report.keys()
    for name, entry in record["matrices"].items():
        stored = found[f"{name}.weight"]
        zeros = int((stored == 0).sum())
        assert entry["shape"] == list(stored.shape) and entry["zeros"] == zeros
        assert in_report[name]["sparsity"] == pytest.approx(zeros / stored.numel())
        if recipe == "wanda-2of4":
            assert ((stored.view(-1, 4) != 0).sum(1) == 2).all()
        else:
            assert ((stored == 0).sum(1) >= stored.shape[1] // 2).all()


def test_hashes_in_the_record_are_those_of_the_files(finished: Callable[[str], Path]) -> None:
    folder = finished("jsq")
    record = json.loads((folder / "llmcompress.json").read_text())
    later = ("README.md", "llmcompress.json", "model.safetensors.index.json", "report.html", "report.json")
    assert record["sha256"] == {k: v for k, v in contents(folder).items() if k not in later}
    assert record["recipe"]["hash"] == Recipe.load(folder / "recipe.yaml").hash == RECIPES["jsq"].hash
    assert record["seed"] == 0 and record["versions"]["torch"] == torch.__version__


def test_perplexity_and_divergence_are_those_of_transformers(
    checkpoint: Path, finished: Callable[[str], Path], text: Path
) -> None:
    """Both folders loaded whole, over the same rows of the text."""
    report = json.loads((finished("w4a16") / "report.json").read_text())
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 16 * 16].view(-1, 16)
    assert report["evaluation"]["samples"] == len(rows)
    p, q = (logits(load(f), rows)[:, :-1].double().log_softmax(-1) for f in (checkpoint, finished("w4a16")))
    for log, figure in ((p, "before"), (q, "after")):
        loss = -log.gather(-1, rows[:, 1:, None]).mean()
        assert report["perplexity"][figure] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert report["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert report["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=2e-3)


def test_evaluate_gives_the_figures_of_the_report(
    checkpoint: Path, finished: Callable[[str], Path], text: Path
) -> None:
    report = json.loads((finished("jsq") / "report.json").read_text())
    rows = api.EvalOptions(texts=(str(text),), windows="rows", length=16)
    found = api.evaluate(finished("jsq"), checkpoint, rows).texts[0]
    assert found.beside is not None
    assert found.beside.kl.value == pytest.approx(report["kl_divergence"], rel=1e-3)
    assert found.beside.top1.value == pytest.approx(report["top1_agreement"], abs=5e-3)
    assert found.perplexity.token.value == pytest.approx(report["perplexity"]["after"], rel=1e-4)
    assert found.beside.reference.token.value == pytest.approx(report["perplexity"]["before"], rel=1e-6)


def test_without_evaluation_its_figures_are_null(checkpoint: Path, tmp_path: Path) -> None:
    report = compress(checkpoint, "wanda-2of4", tmp_path / "out", options(samples=1))
    assert report.perplexity == {"before": None, "after": None}
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["kl_divergence"] is saved["top1_agreement"] is saved["perplexity"]["after"] is None
    assert saved["evaluation"] == {}
    assert "not evaluated" in (tmp_path / "out" / "README.md").read_text()


def test_the_licence_of_the_model_travels(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "LICENSE").write_text("terms")
    compress(source, "wanda-2of4", tmp_path / "out", options(samples=1))
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


@pytest.mark.parametrize(("recipe", "rows"), [("rtn-w8a8", 16), ("wanda-50", 40)])
def test_the_model_writes_no_more_rows_than_the_recipe_reads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, rows: int
) -> None:
    asked: list[int] = []
    write = self_samples

    def count(folder: Path, wanted: list[tuple[int, int, int]], **given: Any) -> list[Tensor]:
        asked.extend(number for number, _, _ in wanted)
        return write(folder, wanted, **given)

    monkeypatch.setattr("llmcompress.source.self_samples", count)
    report = compress(checkpoint, recipe, tmp_path / "out", options(samples=40))
    assert asked == [rows]
    assert report.calibration["samples"] == rows
