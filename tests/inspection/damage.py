"""What the folders are made by, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.export.checkpoint import sha256
from llmcompress.inspection.inspect import inspect

UP = "model.layers.1.mlp.up_proj"
#: recipe and what its widths of 32 and 64 need
FAMILIES: dict[str, tuple[str, ...]] = {
    "jsq": (),
    "gptq-w4a16": ("quantize.weights=int4-g16",),
    "sparsegpt-2of4": (),
    "smoothquant-w8a8": (),
    "llm-pruner-20": (),
    "llm-pruner-w8a8": (),
    "omniquant-w4a16": ("quantize.weights=int4-g16",),
    "jsq-plus-w4a8-2of4": ("quantize.weights=int4-g16-mse",),
    "jsq-plus": (),
    "gptq-w3a16": ("quantize.weights=int3-g16",),
    "smoothquant-w6a6": (),
    "fp8-dynamic": (),
    "fp8-static": (),
}
ASYMMETRIC, PER_TENSOR, STATIC = "int8-asym", "int8-tensor", "static inputs"
FURTHER: dict[str, tuple[str, tuple[str, ...]]] = {
    ASYMMETRIC: ("rtn-w8a8", ("quantize.weights=int4-g8-asym",)),
    PER_TENSOR: ("rtn-w8a8", ("quantize.weights=int8-tensor",)),
    STATIC: ("rtn-w8a8", ("quantize.activations=int8-static",)),
}


def shard_of(folder: Path, tensor: str) -> Path:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            if tensor in list(handle.keys()):
                return file
    raise KeyError(tensor)


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    """Rewrites one tensor, and the shard's hash in the record: only the values betray it."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    rehash(folder)


def rehash(folder: Path) -> None:
    record = json.loads((folder / "llmcompress.json").read_text())
    record["sha256"] = {name: sha256(folder / name) for name in record["sha256"]}
    (folder / "llmcompress.json").write_text(json.dumps(record))


def change_json(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))


def wrong(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What an inspection finds wrong: where and what, by check."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in inspect(folder).verdict.wrong:
        found.setdefault(finding.check, []).append((finding.where, finding.what))
    return found


def revive(weight: Tensor) -> None:
    """The first zero becomes the largest value."""
    flat = weight.view(-1)
    flat[int((flat == 0).nonzero()[0])] = flat.abs().max()


def kill(weight: Tensor) -> None:
    flat = weight.view(-1)
    flat[int(flat.nonzero()[0])] = 0
