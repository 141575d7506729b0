"""Names of modules as a configuration lists them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def name_patterns(names: Iterable[str], all_names: Iterable[str]) -> list[str]:
    """The shortest exact description of ``names`` among ``all_names``: ``re:`` patterns with the layer numbers left
    open where that takes in no other name, plain names elsewhere."""
    wanted = list(dict.fromkeys(names))
    others = {_family(name) for name in set(all_names) - set(wanted)}
    sizes = Counter(_family(name) for name in wanted)
    described = {
        name: f"re:{_family(name)}$" if _family(name) not in others and sizes[_family(name)] > 1 else name
        for name in wanted
    }
    return list(dict.fromkeys(described.values()))


def _family(name: str) -> str:
    """A pattern of ``name`` with every number between dots left open."""
    return ".".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
