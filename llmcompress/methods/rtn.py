"""Rounding to nearest: every weight to the closest level of its own grid, scale = range / (2^b − 1).

Also where the grids of inputs and outputs are set: the quantizers that choose weights more cleverly share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from llmcompress.core.codebook import KINDS
from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.observe import observed_range
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError

#: short names for ``quantize_outputs``
PROJECTIONS = {"q": "*.q_proj", "k": "*.k_proj", "v": "*.v_proj"}


@dataclass(frozen=True)
class RTN(Method):
    """Rounds weights, and notes how the inputs are rounded at run time.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
        quantize_outputs: matrices whose outputs are rounded too, per token with the grid of the inputs: ``q``, ``k``
            and ``v`` for the modules called q_proj, k_proj and v_proj, which are rounded before their positions are
            encoded; or shell patterns over matrix names (``*.query``).
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    quantize_outputs: tuple[str, ...] = ()

    stage = "quantize"

    def __post_init__(self) -> None:
        check_outputs(self.activations, self.quantize_outputs)
        check_kinds(self.weights, self.activations)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The range of the inputs, if their scale is fixed in calibration."""
        if self.activations is None or self.activations.dynamic:
            return frozenset()
        return frozenset({"low", "high"} if self.activations.observer == "minmax" else {"rows"})

    def misfit(self, columns: int) -> str:
        return self.weights.misfit(columns) or (self.activations.misfit(columns) if self.activations else "")

    def misnamed(self, names: Sequence[str]) -> str:
        return unmatched(self.quantize_outputs, names)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        set_activation_grid(group, stats, self.activations)
        set_output_grids(group, self.quantize_outputs)
        most = torch.stack([m.weight.abs().amax() for m in group]).amax() if self.weights.kind == "nvfp4" else None
        for matrix in group:
            matrix.quantize(round_to_nearest(matrix, self.weights, most), out=matrix.weight)
        return stats


def round_to_nearest(matrix: Matrix, grid: QuantGrid, most: Tensor | None = None) -> QuantizedWeight:
    """The matrix's codes on the grid fitted to it; ``most`` is the largest weight of all that a server may fuse with
    it, which share nvfp4's outer scale."""
    if most is None:
        levels = grid.fit(matrix.weight, matrix.scale_dtype)
    else:
        levels = grid.levels(*grid.bounds(matrix.weight), matrix.scale_dtype, most)
    return QuantizedWeight(grid.quantize(matrix.weight, levels, grid.generator(matrix.name)), levels, grid)


def set_activation_grid(group: MatrixGroup, stats: InputStats, grid: QuantGrid | None) -> None:
    """Notes the run-time grid of the inputs, if any can be; a static one is fitted to the calibration's range."""
    grid = grid if group.rounds_inputs else None
    group.activations = grid
    if grid is not None and not grid.dynamic:
        if grid.observer == "minmax":
            low, high = stats.low.amin().clamp(max=0), stats.high.amax().clamp(min=0)
        else:
            low, high = observed_range(grid, list(stats.iter_rows()))
        group.activation_levels = grid.levels(low.view(1, 1), high.view(1, 1), group.matrices[0].scale_dtype)


def set_output_grids(group: MatrixGroup, patterns: Sequence[str]) -> None:
    """Notes which matrices' outputs are rounded at run time: with the grid of the inputs, set before."""
    for matrix in group:
        matrix.outputs = group.activations if any(_means(p, matrix.name) for p in patterns) else None


def check_kinds(weights: QuantGrid, inputs: QuantGrid | None) -> None:
    """Raises UserError if no product of such weights and inputs is known."""
    if inputs is None or weights.kind in KINDS or (inputs.kind == weights.kind and weights.kind in ("int", "fp8")):
        return
    raise UserError(
        f"{inputs.kind} inputs and {weights.kind} weights have no format together",
        "quantize",
        "use fp8 for both, integers for both, or leave activations out",
    )


def check_outputs(activations: QuantGrid | None, patterns: Sequence[str]) -> None:
    """Raises UserError if outputs are to be rounded and the grid of the inputs cannot round them."""
    if patterns and (activations is None or not activations.dynamic or activations.group != "token"):
        raise UserError(
            "outputs take the grid of the inputs, which must be dynamic and per token",
            "quantize_outputs",
            "set activations: int8, or leave quantize_outputs out",
        )


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> str:
    """Says which of the patterns stands for none of the ``names``; empty if each stands for one."""
    idle = [p for p in patterns if not any(_means(p, name) for name in names)]
    return f"quantize_outputs: no quantized Linear is called {PROJECTIONS.get(idle[0], idle[0])}" if idle else ""


def _means(pattern: str, name: str) -> bool:
    return fnmatchcase(name, PROJECTIONS.get(pattern, pattern))
