"""Every damage to weights and files is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.inspection.inspect import inspect
from tests.inspection.damage import UP, change_json, change_tensor, kill, revive, shard_of, wrong

# --- weights ---


def test_a_flipped_bit_in_a_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    file = shard_of(folder, f"{UP}.weight")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert wrong(folder)["hashes"] == [(file.name, "is not the file that was written (SHA-256)")]


@pytest.mark.parametrize("name", ["jsq", "sparsegpt-2of4"])
def test_a_zero_that_is_none_any_more_is_found(copied: Callable[..., Path], name: str) -> None:
    folder = copied(name)
    change_tensor(folder, f"{UP}.weight", revive)
    found = wrong(folder)
    assert [where for where, _ in found["zeros"]] == [UP]
    if name == "sparsegpt-2of4":
        ((where, what),) = found["masks"]
        assert where == UP and "1 of 512 groups keep more than 2 of 4" in what and "row 0" in what


def test_a_further_zero_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("sparsegpt-2of4")
    change_tensor(folder, f"{UP}.weight", kill)
    assert wrong(folder) == {"zeros": [(UP, "the record says 1024 zeros, found 1025")]}


def test_a_code_outside_its_grid_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq-plus-w4a8-2of4")  # four bits in a byte
    change_tensor(folder, f"{UP}.weight", lambda codes: codes.view(-1).__setitem__(0, 9))
    ((where, what),) = wrong(folder)["grid"]
    assert where == f"{UP}.weight" and what.endswith("leave the 4-bit grid [-8, 7]")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_one_is_found(copied: Callable[..., Path], value: float) -> None:
    folder = copied("jsq")
    change_tensor(folder, f"{UP}.weight_scale", lambda scale: scale.view(-1).__setitem__(0, value))
    assert wrong(folder)["scales"] == [(f"{UP}.weight_scale", "has scales that are not finite and positive")]


def test_a_changed_scale_is_found_by_the_hash(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    said = (folder / "llmcompress.json").read_text()
    change_tensor(folder, f"{UP}.weight_scale", lambda scale: scale.mul_(2))
    (folder / "llmcompress.json").write_text(said)
    assert list(wrong(folder)) == ["hashes"]


def test_a_weight_that_is_not_finite_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    change_tensor(folder, "model.norm.weight", lambda weight: weight.__setitem__(0, float("nan")))
    assert "model.norm.weight" in dict(wrong(folder)["finite"])


# --- files ---


def test_a_missing_or_cut_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    (folder / "model-00002-of-00003.safetensors").unlink()
    first = folder / "model-00001-of-00003.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    found = inspect(folder)
    assert {(f.where, f.what[:10]) for f in found.verdict.wrong if f.check == "files"} == {
        ("model-00002-of-00003.safetensors", "is missing"), (first.name, "is damaged"),
    }  # fmt: skip
    assert "the tensors: not all shards can be read" in found.verdict.unchecked


LIES: list[tuple[Callable[[Any], object], str, str]] = [
    (lambda i: i["weight_map"].pop("model.norm.weight"), "model.norm.weight", "not in the index"),
    (lambda i: i["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}), "ghost", "no shard holds it"),
    (lambda i: i["weight_map"].update({f"{UP}.weight": "model-00001-of-00003.safetensors"}), f"{UP}.weight", "but it"),
    (lambda i: i["metadata"].update(total_size=1), "model.safetensors.index.json", "says 1 bytes"),
    (lambda i: i["weight_map"].update({"x": "../x.safetensors"}), "model.safetensors.index.json", "leaves the folder"),
    (lambda i: i.update(weight_map=3), "model.safetensors.index.json", "no weight_map"),
]


@pytest.mark.parametrize(("change", "where", "what"), LIES, ids=[what for _, _, what in LIES])
def test_an_index_that_lies_is_found(
    copied: Callable[..., Path], change: Callable[[Any], object], where: str, what: str
) -> None:
    folder = copied("jsq")
    change_json(folder, "model.safetensors.index.json", change)
    assert [said for place, said in wrong(folder)["index"] if place == where and what in said]


def test_a_stray_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    save_file({"stray": torch.ones(1)}, folder / "extra.safetensors")
    found = wrong(folder)
    assert ("extra.safetensors", "is not named by model.safetensors.index.json") in found["index"]


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "recipe.yaml", "config.json"])
def test_any_other_file_that_was_changed_is_found(copied: Callable[..., Path], file: str) -> None:
    folder = copied("jsq")
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert wrong(folder) == {"hashes": [(file, "is not the file that was written (SHA-256)")]}
