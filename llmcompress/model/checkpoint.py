"""A folder of safetensors read lazily: names, shapes and single tensors, never the whole model."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmcompress.errors import Fault, UserError

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

#: far more than the index of the largest models has
_JSON_BYTES = 2**28
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, without its values."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


class Checkpoint:
    """A Hugging Face folder with safetensors weights.

    Attributes:
        folder: the folder.
        config: ``config.json``.
        tensors: by the name they have on disk.

    Raises:
        UserError: no folder, no config, no safetensors, pickled weights only, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError("no such folder", str(folder), "give a folder that holds config.json and safetensors")
        self.config = _read_json(folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._shards():
            self.tensors.update(_headers(file))
        if not self.tensors:
            raise UserError("the safetensors files hold no tensors", str(folder))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(info.nbytes // info.dtype.itemsize for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype most weights are stored in."""
        bytes_by_dtype: dict[torch.dtype, int] = defaultdict(int)
        for info in self.tensors.values():
            if info.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                bytes_by_dtype[info.dtype] += info.nbytes
        if not bytes_by_dtype:
            raise UserError("no tensor is stored in floating point", str(self.folder), "give the dense checkpoint")
        return max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies tensors into memory, with no mapping of the files, whose pages would count as memory too.

        Raises:
            Fault: a file that could be read when the checkpoint was opened cannot be read any more.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt", backend="pread") as handle:
                    for name in wanted:
                        found[name] = handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise Fault(f"cannot be read any more ({error})", str(self.folder / file), "fetch it again") from None
        return found

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Copies part of a tensor into memory: from ``first`` to before ``last`` along its first axis."""
        with safe_open(self.folder / self.tensors[name].file, framework="pt", backend="pread") as handle:
            part: Tensor = handle.get_slice(name)[first:last]
            return part

    def in_chunks(self, names: Iterable[str], limit: int = 2**27) -> Iterator[list[str]]:
        """The names in lists of about ``limit`` bytes together, so that copying takes no more memory than that."""
        chunk: list[str] = []
        for name in names:
            if chunk and sum(self.tensors[n].nbytes for n in [*chunk, name]) > limit:
                yield chunk
                chunk = []
            chunk.append(name)
        if chunk:
            yield chunk

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            files = [self.folder / name for name in sorted(_named_files(index))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(
                    f"the index names {missing[0]}, which is not there", str(index), "fetch the folder again"
                )
            return files
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(file.name for pattern in _PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise UserError(
                f"weights are pickled ({pickles[0]}), which can run code when read", str(self.folder),
                "convert them to safetensors first: only safetensors is read",
            )  # fmt: skip
        raise UserError("no weights (*.safetensors)", str(self.folder), "give a complete model folder")


def inside(name: str) -> bool:
    """Whether a file name taken from a file is no more than a name: no folder, no ``..``, nothing hidden in it, and no
    longer than file systems allow."""
    length = len(name.encode("utf-8", "surrogatepass"))
    return 0 < length < 256 and name not in (".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def _named_files(index: Path) -> set[str]:
    """The shards that an index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError("has no weight_map of file names", str(index), "fetch the folder again")
    for name in weight_map.values():
        if not inside(name) or not name.endswith(".safetensors"):
            raise UserError(f"names {name!r}, which is no safetensors file of this folder", str(index), "do not use it")
    return set(weight_map.values())


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises UserError naming the tensor if it holds a NaN or an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not all(math.isfinite(extreme) for extreme in (tensor if tensor.itemsize > 1 else tensor.float()).aminmax()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{bad} of {tensor.numel()} weights are NaN or infinite", name, "give an undamaged checkpoint")


def require_no_overflow(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first tensor of finite values that float16 could not hold."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and (lost := int((~tensor.isfinite()).sum())):
            raise UserError(
                f"{lost} of {tensor.numel()} values are too large for float16, in which the checkpoint is stored", name,
                "convert the checkpoint to bfloat16",
            )  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"no {file.name}", str(file.parent), "give a Hugging Face model folder")
    try:
        if file.stat().st_size > _JSON_BYTES:
            raise ValueError(f"more than {_JSON_BYTES >> 20} MiB")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"not readable as JSON: {error}", str(file), "fetch the file again") from None
    if not isinstance(tree, dict):
        raise UserError("not a JSON object", str(file), "fetch the file again")
    return tree


def _headers(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as handle:
            found = {}
            for name in list(handle.keys()):
                part = handle.get_slice(name)
                found[name] = TensorInfo(file.name, tuple(part.get_shape()), _dtype(part.get_dtype(), file))
            return found
    except (SafetensorError, OSError) as error:
        raise UserError(f"damaged or truncated safetensors file ({error})", str(file), "fetch it again") from None


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _dtype(code: str, file: Path) -> torch.dtype:
    if code not in _DTYPES:
        raise UserError(f"tensors of type {code} are not supported", str(file), "convert them to bfloat16 or float32")
    return _DTYPES[code]
