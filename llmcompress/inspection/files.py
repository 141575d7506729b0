"""Whether the files of a folder are what its index and its record say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from llmcompress.export.checkpoint import sha256
from llmcompress.export.destination import RECORD
from llmcompress.inspection.verdict import Verdict
from llmcompress.model.checkpoint import INDEX, inside

#: larger than any report, index or record
_REPORT_BYTES = 2**28


def read_json(file: Path, check: str, verdict: Verdict) -> dict[str, Any] | None:
    """The mapping in a file of the folder; None if there is none, which is wrong only if the file is there."""
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _REPORT_BYTES:
            raise ValueError(f"has more than {_REPORT_BYTES >> 20} MiB")
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("is not a JSON object")
    except (ValueError, RecursionError, OSError) as error:
        verdict.fail(check, file.name, f"not readable: {' '.join(str(error).split())[:120]}")
        return None
    return tree


def check_files(folder: Path, hashes: Mapping[str, Any], verdict: Verdict) -> bool:
    """Index, shards and hashes; False if the tensors cannot all be read.

    Args:
        folder: of the checkpoint.
        hashes: SHA-256 by file name, as the record has them; empty if there is no record.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    weight_map = _weight_map(folder, verdict)
    named = present if weight_map is None else set(weight_map.values())
    held: dict[str, str] = {}
    readable = True
    for name in sorted(named):
        tensors = _names_in(folder, name, verdict)
        readable &= tensors is not None
        for tensor in tensors or ():
            if tensor in held:
                verdict.fail("index", name, f"holds {tensor}, which {held[tensor]} holds too")
            held[tensor] = name
    if weight_map is not None:
        for stray in sorted(present - named):
            verdict.fail("index", stray, f"is not named by {INDEX}")
        _check_index(weight_map, held, verdict)
    _check_hashes(folder, hashes, named, verdict)
    return readable


def check_total_size(folder: Path, size_bytes: int, verdict: Verdict) -> None:
    """The index's sum against that of the tensors."""
    index = read_json(folder / INDEX, "index", verdict) or {}
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != size_bytes:
        verdict.fail("index", INDEX, f"says {said} bytes of tensors, the shards hold {size_bytes}")


def _weight_map(folder: Path, verdict: Verdict) -> dict[str, str] | None:
    index = read_json(folder / INDEX, "index", verdict)
    if index is None:
        return None
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        verdict.fail("index", INDEX, "has no weight_map of file names")
        return None
    outside = sorted({name for name in found.values() if not inside(name)})
    for name in outside:
        verdict.fail("index", INDEX, f"names {name}, which leaves the folder")
    return {tensor: name for tensor, name in found.items() if name not in outside}


def _names_in(folder: Path, name: str, verdict: Verdict) -> list[str] | None:
    """Names of the tensors in a shard; None if it cannot be read."""
    if not (folder / name).is_file():
        verdict.fail("files", name, "is missing")
        return None
    try:
        with safe_open(folder / name, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        verdict.fail("files", name, f"is damaged: {str(error)[:120]}")
        return None


def _check_index(weight_map: Mapping[str, str], held: Mapping[str, str], verdict: Verdict) -> None:
    files = set(held.values())
    for tensor, name in weight_map.items():
        if name in files:  # of a missing shard that is said once
            where = f"it is in {held[tensor]}" if tensor in held else "no shard holds it"
            verdict.require(held.get(tensor) == name, "index", tensor, f"the index says {name}, but {where}")
    for tensor in sorted(held.keys() - weight_map.keys()):
        verdict.fail("index", tensor, f"is in {held[tensor]}, but not in the index: no loader finds it")


def _check_hashes(folder: Path, hashes: Mapping[str, Any], named: set[str], verdict: Verdict) -> None:
    for name, said in sorted(hashes.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not all(inside(p) for p in path.parts):
            verdict.fail("hashes", RECORD, f"names {name}, which leaves the folder")
        elif (folder / name).is_file():
            verdict.require(sha256(folder / name) == said, "hashes", name, "is not the file that was written (SHA-256)")
        else:
            verdict.fail("files", name, "is missing")
    for name in sorted(named - hashes.keys()) if hashes else ():
        verdict.fail("hashes", name, "is not in the record")
