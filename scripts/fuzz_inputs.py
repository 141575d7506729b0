"""Sound inputs with a few things changed, for `fuzz.py`."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

#: stands for a value nested so deep that no recursion survives it
DEEP = "@DEEP@"
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**12, 10**30, -(10**9), 0.5, -0.5, 1e308,
    5e-324, float("nan"), float("inf"), "", " ", "../../outside", "/etc/passwd", "C:\\x", "a\nb", "\x00", "é" * 3,
    "\u202e\x1b[31m", "x" * 100_000, "{{7*7}}", "__import__('os')", "auto", "int8", "2:4", "0:0", "9:8", "int4-g128",
    "*", "[", [], {}, [[]], [1, 2, 3], {"a": 1}, ["x"] * 1000, DEEP,
]  # fmt: skip
KEYS = (
    "stages", "prune", "quantize", "smooth", "clip", "method", "sparsity", "weights", "activations", "targets",
    "include", "auto_map", "quantization_config", "num_hidden_layers", "hidden_size", "model_type", "architectures",
    "weight_map", "rope_parameters", "text", "messages", "prompt", "dtype", "shape", "data_offsets", "__metadata__",
    "layer_types",
)  # fmt: skip


def value(rng: random.Random) -> Any:
    """Something that should not be there."""
    return copy.deepcopy(rng.choice(HOSTILE))


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in pairs:
        yield tree, key
        yield from places(below)


def mutated(tree: Any, rng: random.Random) -> Any:
    """A tree with one to four changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = list(places(tree))
        if not found or rng.random() < 0.03:
            return value(rng)
        owner, key = rng.choice(found)
        kind = rng.random()
        if kind < 0.6:
            owner[key] = value(rng)
        elif kind < 0.75:
            del owner[key]
        elif kind < 0.9 and isinstance(owner, dict):
            owner[rng.choice(KEYS)] = value(rng)
        else:
            other, name = rng.choice(found)
            with contextlib.suppress(KeyError, IndexError):
                owner[key] = copy.deepcopy(other[name])
    return tree


SPLICES = (b"\x00", b"{", b"[" * 5000, b'"', b"\xff\xfe", b"- &a [*a]\n", b"1" * 9999, b"!!python/x ")


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut out, put in, or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        kind = rng.random()
        if kind < 0.4 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            del data[place : place + rng.choice((1, 8, 100))]
        elif kind < 0.85:
            data[place:place] = rng.choice(SPLICES)
        else:
            del data[place:]
    return bytes(data)


def as_json(tree: Any) -> bytes:
    """A tree as JSON."""
    return json.dumps(tree).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).encode("utf-8", "surrogatepass")


def written(tree: Any, rng: random.Random) -> bytes:
    """A tree as JSON, perhaps not quite."""
    content = as_json(tree)
    return mangled(content, rng) if rng.random() < 0.25 else content
