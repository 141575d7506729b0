"""How a recipe writes a grid: words such as ``int4-g128-asym``, or a mapping of its fields."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmcompress.core.codebook import KINDS
from llmcompress.core.floats import FLOATS
from llmcompress.errors import UserError, nearest

if TYPE_CHECKING:
    from llmcompress.core.grid import QuantGrid

GROUPINGS = ("tensor", "channel", "token")
OBSERVERS = ("minmax", "mse")
INPUT_OBSERVERS = ("minmax", "percentile", "mse", "kl", "entropy")
_KEYS = ("bits", "symmetric", "group", "dynamic", "observer", "kind", "values", "stochastic")
#: grids with numbers of bits
_WIDE = ("int", *KINDS)


def parse(value: object, where: str, default: QuantGrid) -> QuantGrid:
    """A grid as written, or one already.

    Args:
        value: words, a mapping, or a grid.
        where: ``weights`` or ``activations``.
        default: fields that are not given.

    Raises:
        UserError: it is no grid, or not one for this.
    """
    if isinstance(value, type(default)):
        return value
    fields = read_fields(value, where)
    if fields.get("dynamic") is False and "group" not in fields and where == "activations":
        fields["group"] = "tensor"
    grid = replace(default, **fields)
    check(grid, where)
    if grid.kind not in FLOATS:
        return replace(grid, bits=math.ceil(math.log2(len(grid.values)))) if grid.values else grid
    bits, size = FLOATS[grid.kind]
    return replace(grid, bits=bits, group=size or grid.group)


def read_fields(value: object, where: str) -> dict[str, Any]:
    """The fields of a grid that are given, unchecked.

    Args:
        value: words or a mapping.
        where: for the error.

    Raises:
        UserError: an unknown word or key.
    """
    fields = dict(value) if isinstance(value, dict) else _parse_words(str(value), where)
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise UserError(f"unknown key '{unknown[0]}'", where, nearest(str(unknown[0]), _KEYS))
    if "values" in fields:
        fields["values"] = _table(fields["values"], f"{where}: values")
    if fields.get("kind") in ("log", "codebook"):
        fields.setdefault("observer", "mse")  # what defines them
    return fields


def _table(values: object, where: str) -> tuple[float, ...]:
    """The levels of a codebook."""
    fix = "write ascending numbers with a zero, such as [-1, -0.4, 0, 0.4, 1]"
    if not isinstance(values, list | tuple) or not all(type(v) in (int, float) for v in values):
        raise UserError(f"{values!r} is no list of numbers", where, fix)
    found = tuple(float(v) for v in values)
    if list(found) != sorted(set(found)) or 0.0 not in found or not 2 <= len(found) <= 256:
        raise UserError("is no table of 2 to 256 levels", where, fix)
    return found


def check(grid: QuantGrid, where: str) -> None:
    """Raises UserError if the fields do not make a grid."""
    seed = grid.stochastic
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UserError(f"{seed!r} is no seed", f"{where}: stochastic", "write a number such as 0")
    if where == "activations" and (seed is not None or grid.kind in KINDS):
        raise UserError("is for weights", f"{where}: {grid.kind if seed is None else 'stochastic'}", "use int8 or fp8")
    if grid.values and grid.kind != "codebook":
        raise UserError(f"{grid.kind} has its own levels", f"{where}: values", "write kind: codebook")
    if grid.kind not in _WIDE:
        return _check_float(grid, where)
    if grid.kind in KINDS and not grid.symmetric:
        raise UserError(f"{grid.kind} has no zero point", where, "leave asym out")
    if grid.kind == "power" and grid.observer != "minmax":
        raise UserError("powers of two take their range from the largest value", where, "leave the observer out")
    if type(grid.bits) is not int or not 2 <= grid.bits <= 8:
        raise UserError(f"{grid.bits} bits", where, "use 2 to 8 bits")
    if isinstance(grid.group, str) and grid.group not in GROUPINGS:
        raise UserError(
            f"unknown group '{grid.group}'", where, nearest(grid.group, GROUPINGS) + ", or a number of columns"
        )
    if isinstance(grid.group, bool) or (isinstance(grid.group, int) and grid.group < 1):
        raise UserError(f"group size {grid.group}", where, "use a positive number of columns")
    if not isinstance(grid.symmetric, bool) or not isinstance(grid.dynamic, bool):
        raise UserError("symmetric and dynamic are true or false", where)
    observers = INPUT_OBSERVERS if where == "activations" else OBSERVERS
    if grid.observer not in observers:
        raise UserError(f"unknown observer '{grid.observer}'", where, nearest(str(grid.observer), observers))


def _check_float(grid: QuantGrid, where: str) -> None:
    if grid.kind not in FLOATS:
        raise UserError(f"unknown kind '{grid.kind}'", where, nearest(grid.kind, [*_WIDE, *FLOATS]))
    size = FLOATS[grid.kind][1]
    if not grid.symmetric or grid.observer != "minmax":
        raise UserError(f"{grid.kind} is symmetric and takes its range from the largest value", where)
    if size and (where == "activations" or grid.group not in ("channel", size)):
        raise UserError(f"{grid.kind} is for weights in groups of {size}", where, f"write {grid.kind} and no more")
    if not size and isinstance(grid.group, int):
        raise UserError(f"{grid.kind} has no groups of columns", where, "group by channel, tensor or token")


def _parse_words(text: str, where: str) -> dict[str, object]:
    """``int4-g128-asym`` as fields."""
    head, *words = text.strip().split("-")
    wide = re.fullmatch(rf"({'|'.join(_WIDE)})(\d{{1,3}})", head)
    if head not in FLOATS and not wide:
        fix = "write int8, int4-g128, fp8, power4, or {bits: 6, group: channel, symmetric: true}"
        raise UserError(f"'{text}' is no grid", where, fix)
    fields: dict[str, object] = {"kind": wide[1], "bits": int(wide[2])} if wide else {"kind": head}
    meanings: dict[str, tuple[str, object]] = {
        "asym": ("symmetric", False),
        "sym": ("symmetric", True),
        "static": ("dynamic", False),
        "stochastic": ("stochastic", 0),
    }
    meanings |= {"dynamic": ("dynamic", True)} | {name: ("observer", name) for name in INPUT_OBSERVERS}
    meanings |= {name: ("group", name) for name in GROUPINGS}
    for word in words:
        if re.fullmatch(r"g\d{1,9}", word):
            fields["group"] = int(word[1:])
        elif word in meanings:
            key, meaning = meanings[word]
            fields[key] = meaning
        else:
            raise UserError(f"'{word}' in '{text}' is unknown", where, nearest(word, [*meanings, "g128"]))
    return fields
