"""Keeps the values that a group's matrices have before they are rounded: what the tokens go on through where a recipe
propagates its pruned, unquantized outputs. Stands before the first quantize stage."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class KeepUnrounded(Method):
    """Notes each matrix's present weight as its unrounded one."""

    stage = "quantize"

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        for matrix in group:
            matrix.unrounded = matrix.weight.clone()  # steps that follow may overwrite it
        return stats


def keeping_unrounded(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """The steps with one more before the first that rounds; a prune step before it no longer shares its sweep."""
    first = next((i for i, method in enumerate(methods) if method.stage == "quantize"), len(methods))
    return (*methods[:first], KeepUnrounded(), *methods[first:]) if first < len(methods) else methods
