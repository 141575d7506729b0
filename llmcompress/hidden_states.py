"""What travels between two blocks, on disk: the value that a block returned to one forward, in a safetensors file.

Blocks return a tensor, or tuples, lists and mappings of tensors and plain values; what else they may return is refused.
A value reads back as it was, strides included, so that the next block computes the same bits from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmcompress.errors import UserError
from llmcompress.model.load import BlockwiseModel

_FORM = "form"


def save_value(path: Path, value: object) -> None:
    """Writes what a block returned; it is not forced to disk yet.

    Raises:
        UserError: it holds what cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    form = json.dumps(_encoded(value, tensors))
    save_file(tensors, path, {_FORM: form})


def load_value(path: Path, device: str = "cpu") -> Any:
    """What `save_value` wrote."""
    with safe_open(path, framework="pt", backend="pread") as file:
        form = json.loads(file.metadata()[_FORM])
        return _decoded(form, lambda name: file.get_tensor(name).to(device))


class StoredValues(Sequence[Any]):
    """The values of several files, each read when it is asked for.

    Args:
        paths: of the files.
        device: where the tensors go.
    """

    def __init__(self, paths: Sequence[Path], device: str) -> None:
        self._paths, self._device = paths, device

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return load_value(self._paths[index], self._device)

    def __iter__(self) -> Iterator[Any]:
        return (load_value(path, self._device) for path in self._paths)


def digest(tree: object) -> str:
    """sha256 of all tensors in a tree of arguments, in order."""
    found = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def kept_bytes(model: BlockwiseModel, tokens: int) -> int:
    """Bytes on disk of what travels between blocks: the last block's and the present one's, of two lanes."""
    return 4 * tokens * int(model.model.config.get_text_config().hidden_size) * model.dtype.itemsize


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        plain = value.detach().cpu().contiguous()
        shared = plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() in _addresses(tensors)
        tensors[name] = plain.clone() if shared else plain
        dense = value.is_contiguous() or 0 in value.stride()  # an expanded tensor comes back with memory of its own
        return {"tensor": name, "stride": None if dense else list(value.stride())}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_encoded(part, tensors) for part in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(part, tensors) for key, part in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UserError(f"a block returns {type(value).__name__}, which cannot be kept on disk", "model")


def _addresses(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors.values()}


def _decoded(form: dict[str, Any], tensor: Any) -> Any:
    ((kind, content), *_) = form.items()
    if kind == "tensor":
        read: Tensor = tensor(content)
        stride = form["stride"]
        # into memory of torch's own alignment, on which some kernels' order of summation depends
        empty = torch.empty_like(read) if stride is None else torch.empty_strided(
            read.shape, stride, dtype=read.dtype, device=read.device
        )  # fmt: skip
        return empty.copy_(read)
    if kind == "dict":
        return {key: _decoded(part, tensor) for key, part in content.items()}
    if kind in ("tuple", "list"):
        parts = [_decoded(part, tensor) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    return content
