"""How a recipe writes a grid: words such as ``int4-g128-asym``, or a mapping of its fields."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmcompress.core.floats import FLOATS
from llmcompress.errors import UserError, nearest

if TYPE_CHECKING:
    from llmcompress.core.grid import QuantGrid

GROUPINGS = ("tensor", "channel", "token")
OBSERVERS = ("minmax", "mse")
INPUT_OBSERVERS = ("minmax", "percentile", "mse", "kl", "entropy")
_KEYS = ("bits", "symmetric", "group", "dynamic", "observer", "kind")


def read_fields(value: object, where: str) -> dict[str, Any]:
    """The fields of a grid that are given, unchecked.

    Args:
        value: words or a mapping.
        where: for the error.

    Raises:
        UserError: an unknown word or key.
    """
    if not isinstance(value, dict):
        return _parse_words(str(value), where)
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise UserError(f"unknown key '{unknown[0]}'", where, nearest(str(unknown[0]), _KEYS))
    return dict(value)


def check(grid: QuantGrid, where: str) -> None:
    """Raises UserError if the fields do not make a grid."""
    if grid.kind != "int":
        return _check_float(grid, where)
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
        raise UserError(f"unknown kind '{grid.kind}'", where, nearest(grid.kind, ["int", *FLOATS]))
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
    if head not in FLOATS and not re.fullmatch(r"int\d{1,3}", head):
        raise UserError(
            f"'{text}' is no grid", where, "write int8, int4-g128, fp8, or {bits: 6, group: channel, symmetric: true}"
        )
    fields: dict[str, object] = {"kind": head} if head in FLOATS else {"bits": int(head[3:])}
    meanings: dict[str, tuple[str, object]] = {
        "asym": ("symmetric", False),
        "sym": ("symmetric", True),
        "static": ("dynamic", False),
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
