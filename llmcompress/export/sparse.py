"""The sparse container: a checkpoint folder whose zeros take no room, for storing and sending; nothing runs from it.

    pack(folder, packed)      unpack(packed, folder)      every file comes back bit for bit

Each safetensors file becomes one of the same name. A tensor that gets smaller is kept as two, ``NAME:where`` and
``NAME:values`` (`llmcompress.export.zeros`), the others as their bytes; the file's own header is kept as it was. Other
files are copied, except that ``config.json`` is put away as ``packed-config.json``, so that no loader takes the folder
for a checkpoint and fills the missing weights at random. ``sparse.json`` lists codings, shapes and the hash of every
original file, which ``unpack`` checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmcompress.errors import UserError
from llmcompress.export.destination import PACKED, is_packed, refuse_network, sha256
from llmcompress.export.rewriting import new_folder
from llmcompress.export.zeros import NIBBLE_ZERO, Array, Bytes, decode, encode, from_nibbles, to_nibbles

PACKED_CONFIG = "packed-config.json"
_HEADER = "header"
_WIDTHS = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
#: a tensor is kept as it is unless this share of it is saved
_WORTH = 0.02


def pack(folder: Path, output: Path, force: bool = False) -> dict[str, int]:
    """Writes ``output``, which holds ``folder`` with its zeros left out.

    Args:
        folder: of a checkpoint; left as it is unless it is ``output``.
        output: to write.
        force: replace an earlier output of this program.

    Returns:
        Bytes of the weight files, ``before`` and ``after``.

    Raises:
        UserError: not a checkpoint, packed already, or ``output`` may not be written.
    """
    _require_folder(folder)
    refuse_network(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if is_packed(folder):
        raise UserError("is packed already", str(folder), "give the folder of a checkpoint")
    if not (folder / "config.json").is_file() or not shards:
        raise UserError("holds no config.json with safetensors weights", str(folder), "give the folder of a checkpoint")
    index: dict[str, Any] = {"version": 1, "files": {}}
    with new_folder(output, force, folder) as partial:
        for shard in shards:
            index["files"][shard.name] = _pack_shard(shard, partial / shard.name)
        _copy_others(folder, partial, {"config.json": PACKED_CONFIG}, leave=index["files"])
        (partial / PACKED).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        after = sum((partial / shard.name).stat().st_size for shard in shards)
        before = sum(shard.stat().st_size for shard in shards)
    return {"before": before, "after": after}


def unpack(folder: Path, output: Path, force: bool = False) -> dict[str, int]:
    """Writes the checkpoint that ``pack`` was given.

    Returns:
        Bytes of the weight files, ``before`` and ``after``.

    Raises:
        UserError: not a packed folder, damaged, or ``output`` may not be written.
    """
    _require_folder(folder)
    if not is_packed(folder):
        raise UserError(f"is not packed (no {PACKED} in it)", str(folder), "give a folder that `pack` wrote")
    index = json.loads((folder / PACKED).read_text(encoding="utf-8"))
    with new_folder(output, force, folder) as partial:
        for name, entry in index["files"].items():
            try:
                _unpack_shard(folder / name, partial / name, entry["tensors"])
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise UserError(f"cannot be unpacked ({error})", str(folder / name), "fetch it again") from error
            if sha256(partial / name) != entry["sha256"]:
                raise UserError("does not unpack to the bytes that were packed", str(folder / name), "fetch it again")
        _copy_others(folder, partial, {PACKED_CONFIG: "config.json"}, leave=(PACKED, *index["files"]))
        after = sum((partial / name).stat().st_size for name in index["files"])
        before = sum((folder / name).stat().st_size for name in index["files"])
    return {"before": before, "after": after}


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError("no such folder", str(folder), "check the spelling")


def _pack_shard(shard: Path, target: Path) -> dict[str, Any]:
    """Writes one packed file; what its tensors are and the hash of the original."""
    header, start = _read_header(shard)
    kept: dict[str, Array] = {_HEADER: np.frombuffer(header, np.uint8)}
    listed: dict[str, Any] = {}
    with shard.open("rb") as stream:
        for name, entry in sorted(_tensors(header).items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            stream.seek(start + first)
            data = np.frombuffer(stream.read(last - first), np.uint8)
            coding, parts = _smaller(name, data, entry)
            listed[name] = {"coding": coding, "codes": _count(name, entry)} if coding else {}
            kept |= {f"{name}:{part}": value for part, value in parts.items()}
    save_file(kept, target)
    return {"sha256": sha256(shard), "tensors": listed}


def _smaller(name: str, data: Bytes, entry: dict[str, Any]) -> tuple[str, dict[str, Array]]:
    """The coding and its parts; no coding and the bytes themselves where nothing is gained."""
    width = _WIDTHS.get(entry["dtype"], 0)
    nibbles = _is_nibbles(name, entry)
    if not width or not data.size:
        return "", {"bytes": data}
    codes = to_nibbles(data) if nibbles else data.view(f"u{width}")
    coding, where, values = encode(codes, NIBBLE_ZERO if nibbles else 0, 4 if nibbles else 8 * width)
    if nibbles:
        values = from_nibbles(values.astype(np.uint8))
    if where.nbytes + values.nbytes > (1 - _WORTH) * data.nbytes:
        return "", {"bytes": data}
    return coding, {"where": where, "values": values}


def _unpack_shard(packed: Path, target: Path, listed: dict[str, Any]) -> None:
    with safe_open(packed, framework="np") as handle, target.open("wb") as stream:
        header = handle.get_tensor(_HEADER).tobytes()
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, entry in sorted(_tensors(header).items(), key=lambda item: item[1]["data_offsets"]):
            how = listed[name]
            if not how:
                stream.write(handle.get_tensor(f"{name}:bytes").tobytes())
                continue
            where, values = (handle.get_tensor(f"{name}:{part}") for part in ("where", "values"))
            stream.write(_restored(how, where, values, _is_nibbles(name, entry)).tobytes())


def _restored(how: dict[str, Any], where: Bytes, values: Array, nibbles: bool) -> Array:
    coding, count = str(how["coding"]), int(how["codes"])
    if not nibbles:
        return decode(coding, where, values, count, 0)
    halves = to_nibbles(values.astype(np.uint8))
    kept = int(np.unpackbits(where, count=count).sum()) if coding == "mask" else count // 2
    return from_nibbles(decode(coding, where, halves[:kept], count, NIBBLE_ZERO).astype(np.uint8))


def _count(name: str, entry: dict[str, Any]) -> int:
    first, last = entry["data_offsets"]
    size: int = last - first
    return 2 * size if _is_nibbles(name, entry) else size // _WIDTHS[entry["dtype"]]


def _is_nibbles(name: str, entry: dict[str, Any]) -> bool:
    """Whether the tensor is 4-bit codes, eight in an int32, as `pack-quantized` stores them. Codes of other widths are
    kept right as well, only not smaller."""
    return name.endswith("weight_packed") and entry["dtype"] == "I32"


def _read_header(shard: Path) -> tuple[bytes, int]:
    """The JSON header of a safetensors file, and where its data starts."""
    with shard.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size)
    if len(header) != size or not header.startswith(b"{"):
        raise UserError("damaged or truncated safetensors file", str(shard), "fetch it again")
    return header, 8 + size


def _tensors(header: bytes) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}


def _copy_others(folder: Path, target: Path, renamed: dict[str, str], leave: Iterable[str]) -> None:
    """All files but those to ``leave``, under new names where ``renamed`` has them."""
    left = set(leave)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and str(relative) not in left:
            place = target / renamed.get(str(relative), str(relative))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
