"""Rounding to nearest: every weight to the closest level of its own grid, scale = range / (2^b − 1).

Also where the grid of the inputs is set: the quantizers that choose weights more cleverly share it."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class RTN(Method):
    """Rounds weights, and notes how the inputs are rounded at run time.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None

    stage = "quantize"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The range of the inputs, if their scale is fixed in calibration."""
        static = self.activations is not None and not self.activations.dynamic
        return frozenset({"low", "high"}) if static else frozenset()

    def misfit(self, columns: int) -> str:
        return self.weights.misfit(columns) or (self.activations.misfit(columns) if self.activations else "")

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        set_activation_grid(group, stats, self.activations)
        for matrix in group:
            matrix.quantize(round_to_nearest(matrix, self.weights))
        return stats


def round_to_nearest(matrix: Matrix, grid: QuantGrid) -> QuantizedWeight:
    """The matrix's codes on the grid fitted to it."""
    levels = grid.fit(matrix.weight, matrix.scale_dtype)
    return QuantizedWeight(grid.quantize(matrix.weight, levels), levels, grid)


def set_activation_grid(group: MatrixGroup, stats: InputStats, grid: QuantGrid | None) -> None:
    """Notes the run-time grid of the inputs, if any can be; a static one is fitted to the calibration's range."""
    grid = grid if group.rounds_inputs else None
    group.activations = grid
    if grid is not None and not grid.dynamic:
        low, high = stats.low.amin().clamp(max=0), stats.high.amax().clamp(min=0)
        group.activation_levels = grid.levels(low.view(1, 1), high.view(1, 1), group.matrices[0].scale_dtype)
