"""Values of a recipe as the fields of a method want them, by the fields' annotations."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError


def converted(value: object, hint: object, key: str, where: str) -> object:
    """``value`` as the field's annotation wants it.

    Args:
        value: as YAML has it.
        hint: the annotation.
        key: name of the field.
        where: for the error.

    Raises:
        UserError: it does not fit.
    """
    where = f"{where}.{key}"
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and value is None:
        return None
    kinds = [o for o in options if o is not type(None)]
    parse = _parser(kinds, key)
    if parse is not None:
        try:
            return parse(value)
        except UserError as error:
            raise UserError(error.what, where, error.fix) from None
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(converted(v, typing.get_args(kind)[0], key, where) for v in value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{value} is not a finite number", where)
            return float(value)
        if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return value
        if isinstance(kind, type) and type(value) is kind:
            return value
    raise UserError(f"{value!r} is not {_spoken(hint)}", where)


def _parser(kinds: list[object], key: str) -> Callable[[object], object] | None:
    """What reads a field of a type that has a notation of its own."""
    if Sparsity in kinds:
        return Sparsity.parse
    if QuantGrid in kinds:
        return QuantGrid.parse_activations if key == "activations" else QuantGrid.parse_weights
    return None


def _spoken(hint: object) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spoken(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if len(typing.get_args(hint)) == 1:
            return str(typing.get_args(hint)[0])
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_spoken(typing.get_args(hint)[0])}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
    return names.get(typing.cast(type, hint), f"a value of type {str(hint).replace('typing.', '')}")
