"""A model that is streamed block by block gives the same bytes wherever its parts lie, and whatever it is stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress import api, compress
from llmcompress.errors import UserError
from llmcompress.hidden_states import load_value, save_value
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.offload import ParkedForward
from llmcompress.recipe import Recipe
from llmcompress.suspend import AtBlock
from llmcompress.walk import Walk
from tests.architectures import tiny_folder

OPTIONS = api.Options(samples=4, length=16, device="cpu", evaluate=False)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# --- hidden states on disk ---


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("recipe", ["jsq", "sparsegpt-best-50", "omniquant-w8a8"])
def test_offloaded_activations_give_the_same_bytes(model_type: str, recipe: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", model_type)
    overrides = ["quantize.epochs=1"] if recipe.startswith("omniquant") else []
    asked = Recipe.load(recipe, overrides)
    compress(source, asked, tmp_path / "memory", OPTIONS)
    compress(source, asked, tmp_path / "disk", replace(OPTIONS, offload_activations=True))
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")


def test_forwards_that_wait_hold_no_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, held = Walk._serve, []

    def look(walk: Walk, *given: Any) -> Any:
        for forward in walk.lanes[0].forwards:
            assert isinstance(forward, ParkedForward) and isinstance(forward.place, AtBlock)
            held.append(forward.place.args[0].untyped_storage().nbytes())
        return serve(walk, *given)

    monkeypatch.setattr(Walk, "_serve", look)
    compress(tiny_folder(tmp_path / "dense"), "wanda-50", tmp_path / "out", replace(OPTIONS, offload_activations=True))
    assert held and not any(held)


def test_a_walk_neither_holds_nor_needs_the_folder_on_whose_disk_its_forwards_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of a run may empty it while another is at work there."""
    source, folder = tiny_folder(tmp_path / "dense"), tmp_path / "waiting"
    folder.mkdir()
    rows = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))

    def walked(offload: Path | None) -> list[dict[str, Tensor]]:
        model = BlockwiseModel(Checkpoint(source), torch.float32)
        walk = Walk(model, Recipe.load("wanda-50"), rows, replay=True, offload=offload)
        return [dict(block.tensors) for block in walk.run()]

    expected, serve = walked(None), Walk._serve

    def remove(walk: Walk, *given: Any) -> Any:
        if folder.exists():
            folder.rmdir()  # refuses a folder that is not empty
        return serve(walk, *given)

    monkeypatch.setattr(Walk, "_serve", remove)
    for one, other in zip(walked(folder), expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not folder.exists()


VALUES: list[Any] = [
    torch.randn(2, 3, 4), torch.randn(2, 3).bfloat16(), torch.randn(4, 3).T,
    torch.arange(12.0).view(3, 4)[:, 1:3], (torch.randn(2), None),
    [torch.ones(1), (torch.zeros(2), 3, "a")], {"x": torch.ones(2, dtype=torch.int64)},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_what_a_block_returns_reads_back_as_it_was(value: Any, tmp_path: Path) -> None:
    save_value(tmp_path / "value", value)
    same(value, load_value(tmp_path / "value"))


def test_a_tensor_that_repeats_its_memory_reads_back_with_memory_of_its_own(tmp_path: Path) -> None:
    x = torch.randn(1, 4).expand(3, 4)
    save_value(tmp_path / "value", x)
    assert torch.equal(load_value(tmp_path / "value"), x)


def test_a_tensor_that_is_returned_twice_reads_back_twice(tmp_path: Path) -> None:
    x = torch.randn(3)
    save_value(tmp_path / "value", (x, x))
    same((x, x), load_value(tmp_path / "value"))


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a block returns object, which cannot be kept"):
        save_value(tmp_path / "value", (torch.ones(1), object()))


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
        assert a.is_contiguous() == b.is_contiguous()
    elif isinstance(a, dict):
        same(list(a.items()), list(b.items()))
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b


# --- whatever a model is stored in ---


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_layout_and_dtype_is_read_and_kept(dtype: torch.dtype, size: str, tied: bool, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "whole", dtype=dtype, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size=size)
    assert (len(list((tmp_path / "dense").glob("*.safetensors"))) > 1) == (size == "20KB")
    compress(tmp_path / "dense", "wanda-50", tmp_path / "out", OPTIONS)  # on its own samples: there is no tokenizer
    compress(tmp_path / "whole", "wanda-50", tmp_path / "from-whole", OPTIONS)
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert ("lm_head.weight" in found) != tied
    expected = tensors(tmp_path / "from-whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(5)[None]).logits.isfinite().all()


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def test_values_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    """Large weights behind a small input: smoothing the other way would make them larger still."""
    source = tiny_folder(tmp_path / "dense", dtype=torch.float16)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    stored[name] = (stored[name].float() * (60000 / stored[name].float().abs().max())).half()
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    recipe = {"stages": [{"smooth": {"method": "smoothquant", "alpha": 0.99}}, {"prune": {"sparsity": 0.5}}]}
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.\w+\.weight: \d+ of 2048 values are too large"):
        compress(source, Recipe.from_tree(recipe, "smooth"), tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# --- widths that a pattern does not divide ---


@pytest.fixture
def misfitting(tmp_path: Path) -> Path:
    """A model of which down_proj has 172 columns, which groups of eight do not divide."""
    return tiny_folder(tmp_path / "dense", intermediate_size=172)


def test_a_misfit_is_one_line_before_anything_starts(misfitting: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.mlp\.down_proj: pattern 4:8 does not divide 172 .*--on-misfit skip"):
        compress(misfitting, "wanda-4of8", tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_misfits_are_left_dense_and_listed_where_that_is_asked_for(misfitting: Path, tmp_path: Path) -> None:
    report = compress(misfitting, "wanda-4of8", tmp_path / "out", replace(OPTIONS, on_misfit="skip"))
    before, after = tensors(misfitting), tensors(tmp_path / "out")
    for name in before:
        pruned = name.endswith("_proj.weight") and "down_proj" not in name
        assert torch.equal(before[name], after[name]) != pruned
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    for number in range(2):
        told = f"model.layers.{number}.mlp.down_proj: left dense, pattern 4:8 does not divide 172"
        assert any(warning.startswith(told) for warning in saved["warnings"])
    assert "down_proj" in report.table() and "left dense" in report.table()
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").exclude == ("*.down_proj",)
    plan = api.plan(misfitting, "wanda-4of8", options=replace(OPTIONS, on_misfit="skip"))
    assert any("down_proj: left dense" in note for note in plan.notes)


def test_where_nothing_fits_that_is_the_reason_given(misfitting: Path, tmp_path: Path) -> None:
    skipping = replace(OPTIONS, on_misfit="skip")
    with pytest.raises(UserError, match=r"pattern 3:7 does not divide .*, and so for every matrix"):
        compress(misfitting, "wanda-4of8", tmp_path / "out", skipping, overrides=["prune.sparsity=3:7"])


def test_where_only_some_of_a_kind_misfit_they_are_named_one_by_one(
    misfitting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: Callable[[], str]
) -> None:
    monkeypatch.setattr("llmcompress.core.sparsity.Sparsity.misfit", lambda self, columns: refusing())
    compress(misfitting, "wanda-4of8", tmp_path / "out", replace(OPTIONS, on_misfit="skip"))
    exclude = Recipe.load(tmp_path / "out" / "recipe.yaml").exclude
    assert exclude == ("model.layers.0.self_attn.q_proj",)


@pytest.fixture
def refusing() -> Callable[[], str]:
    """Refuses the first width that it is asked about, and no other."""
    asked = iter(["no"])
    return lambda: next(asked, "")
