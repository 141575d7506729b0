"""Matrices that hardly any calibration token reaches: experts the router seldom chooses, and what no forward calls.

They are compressed like the others, by what needs no rows, and named in the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

#: an expert with fewer calibration rows is pruned by magnitude and rounded to nearest
MIN_EXPERT_ROWS = 32


class Starved:
    """Who got too few rows.

    Args:
        layers: names of the modules that hold experts.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._prefixes = tuple(f"{layer}." for layer in layers)
        self._experts: dict[str, set[int]] = defaultdict(set)
        self._others: list[str] = []

    def is_expert(self, name: str) -> bool:
        """Whether the matrix of this dotted name belongs to an expert."""
        return name.startswith(self._prefixes) if self._prefixes else False

    def note(self, name: str) -> None:
        """Remembers a matrix that got too few rows."""
        if not self.is_expert(name):
            self._others.append(name)
            return
        layer = next(prefix for prefix in self._prefixes if name.startswith(prefix))
        self._experts[layer].add(int(name.removeprefix(layer).partition(".")[0]))

    def warnings(self) -> Iterator[str]:
        """One line per layer of experts and one per other matrix; they are forgotten then."""
        did = "pruned by magnitude and rounded to nearest, as far as the recipe prunes and rounds"
        for layer, experts in self._experts.items():
            which = ", ".join(_ranges(sorted(experts)))
            yield (
                f"{layer.removesuffix('.')}: experts {which} got fewer than {MIN_EXPERT_ROWS} calibration tokens: {did}"
            )
        for name in self._others:
            yield f"{name}: no calibration token reached it: {did}"
        self._experts.clear()
        self._others.clear()


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """``[1, 2, 3, 7]`` → ``1–3``, ``7``."""
    for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        values = [value for _, value in run]
        yield str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"
