"""What a config.json may ask for, given the weights beside it: transformers builds what it says, a billion layers too.

Numbers that decide how many modules there are must not exceed what the checkpoint could fill, and nothing that is
computed while the modules are built may be far larger than its largest tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmcompress.errors import UserError

#: names of numbers of modules, and how many are always allowed
_COUNTS = ((re.compile(r"(^|_)(layers?|blocks?)(_|$)"), 1 << 10), (re.compile(r"experts?(_|$)"), 1 << 12))
#: entries of a filled tensor, and numbers in a row, that are always allowed
_FILLED, _COUNTED = 1 << 24, 1 << 22
_WITH_SIZE = {torch.ones, torch.zeros, torch.rand, torch.randn}


def require_plausible(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuses more layers or experts than the tensors of the checkpoint could be.

    Args:
        config: ``config.json``.
        tensors: how many there are.
        where: for the error.

    Raises:
        UserError: there are.
    """
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value if isinstance(item, dict)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for names, always in _COUNTS:
                if names.search(key) and not value <= max(always, tensors):
                    raise UserError(f"{key} is {value}, but there are {tensors} tensors", where, "check config.json")


class BoundedFactories(TorchFunctionMode):
    """Refuses to fill a tensor far larger than the largest of the checkpoint, before it takes memory.

    What is not filled (``torch.empty``) takes none, and goes to the meta device.

    Args:
        largest: entries of the checkpoint's largest tensor.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.limit = max(_FILLED, 4 * largest)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked, limit = _entries(func, args, kwargs)
        if asked > (limit or self.limit):
            raise ValueError(f"config.json asks for a tensor of {asked:.3g} entries")
        return func(*args, **kwargs)


def _entries(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, int]:
    """Entries of the tensor that a call makes, and a limit of its own; 0 for what makes none from nothing."""
    if func is torch.arange:
        bounds = [x for x in (*args, kwargs.get("start"), kwargs.get("end")) if isinstance(x, int | float)]
        step = bounds[2] if len(args) > 2 else kwargs.get("step", 1)
        span = abs(bounds[1] - bounds[0]) if len(bounds) > 1 else abs(bounds[0]) if bounds else 0
        return span / abs(step) if isinstance(step, int | float) and step else 0, _COUNTED
    if func is torch.full:
        size = args[0] if args else kwargs.get("size", ())
    elif func in _WITH_SIZE:
        size = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args)
    elif func is torch.eye:
        size = args[:2] if len(args) > 1 and isinstance(args[1], int) else args[:1] * 2
    else:
        return 0, 0
    extents = [abs(x) for x in (size if isinstance(size, list | tuple) else (size,)) if isinstance(x, int)]
    return float(math.prod(extents)) if extents else 0, 0
