"""What the bytes of a result hang on: model, recipe, options, data and versions. Two runs with the same identity write
the same files, so that one can go on where the other was stopped; of two that differ it can be said in what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import Any

import torch

from llmcompress.export.checkpoint import sha256
from llmcompress.export.companions import COMPANIONS, REMOTE_CODE, companions
from llmcompress.measure import versions
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.options import Options
from llmcompress.recipe import Recipe

#: options that change how a result is computed and not its bytes
WITHOUT_EFFECT = frozenset({"low_memory", "offload_activations"})
#: files that are hashed at a time, at most
READERS = 8
_NONE = "nothing"


class Hashing:
    """SHA-256 of everything that is read or copied of a model, found in the background.

    Args:
        checkpoint: the model.
        options: whether code that came with it is copied.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        weights = {checkpoint.folder / info.file for info in checkpoint.tensors.values()}
        patterns = COMPANIONS + (REMOTE_CODE if options.trust_remote_code else ())
        files = sorted({*weights, checkpoint.folder / "config.json", *companions(checkpoint.folder, patterns)})
        self._pool = ThreadPoolExecutor(min(torch.get_num_threads(), READERS), "hashing")
        self._closed = Event()
        self._found = {f.relative_to(checkpoint.folder).as_posix(): self._pool.submit(self._hash, f) for f in files}

    def __len__(self) -> int:
        return len(self._found)

    def result(self, advance: Callable[[int], None] = lambda files: None) -> dict[str, str]:
        """By path within the folder, as soon as all are known; ``advance`` is told of every file."""
        hashes = {}
        for name, found in self._found.items():
            hashes[name] = found.result()
            advance(1)
        return hashes

    def close(self) -> None:
        """Ends what is not finished: a run that is refused need not wait for it."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _hash(self, file: Path) -> str:
        return sha256(file, lambda: not self._closed.is_set())


def identity(
    name: str, hashes: Mapping[str, str], recipe: Recipe, options: Options, arithmetic: str
) -> dict[str, Any]:  # fmt: skip
    """As plain JSON.

    Args:
        name: of the model, as it was given.
        hashes: of its files.
        recipe: what is done.
        options: those in WITHOUT_EFFECT stay out.
        arithmetic: device and dtype.
    """
    data = [options.calibration, options.eval_text or ""]
    tree = {
        "model": name,
        "model files": dict(hashes),
        "recipe": {"name": recipe.name, **recipe.to_tree()},
        "options": {f.name: getattr(options, f.name) for f in fields(options) if f.name not in WITHOUT_EFFECT},
        "data": {source: sha256(Path(source)) for source in data if Path(source).is_file()},
        "arithmetic": arithmetic,
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(tree))
    return plain


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two identities, e.g. ``options.seed was 0, is 1``."""
    before, after = _flat(then), _flat(now)
    return [
        f"{key} was {_short(before.get(key, _NONE))}, is {_short(after.get(key, _NONE))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _NONE) != after.get(key, _NONE)
    ]


def _flat(tree: object, place: str = "") -> dict[str, object]:
    if isinstance(tree, Mapping) and tree:
        items = [_flat(value, f"{place}.{key}" if place else str(key)) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        items = [_flat(value, f"{place}[{number}]") for number, value in enumerate(tree)]
    else:
        return {place: tree}
    return {key: value for part in items for key, value in part.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
