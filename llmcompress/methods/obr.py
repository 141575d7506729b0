"""OBR, optimal brain restoration (Guo et al., ICLR 2026, arXiv:2509.11177): what pruning and rounding take from one
group of a row's weights is given back by the others. With the errors e_E of a group E fixed, the best change of the
remaining weights R is closed-form, row by row:

    Δw_R = −(H_RR)⁻¹ H_RE e_E

first with E the pruned weights and R the kept ones; then with E the kept weights of the first columns once these are
rounded, and R the other kept weights, which are rounded to nearest last. A quantize stage: the mask is that of the
prune stage before it, Wanda's in the paper.

Departures: the rows are not solved one by one with a factorisation each, but all at once by conjugate gradients, to
a tolerance (see `llmcompress.core.compensate`). No Hadamard rotation goes before it: the model is to stay one that
every program loads, so a smooth stage has to tame the outliers. Scales that the columns rounded last share with no
others are fitted again after the second compensation. H is that of the inputs as run time rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.compensate import LeastSquares
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods.curvature import Curvature, Problem, check_damping, gram_for
from llmcompress.methods.gptq import run_time_gram
from llmcompress.methods.rtn import RTN, set_activation_grid

#: share of the loss below which a step of the conjugate gradients ends them
LEAST_GAIN = 1e-5


@dataclass(frozen=True)
class OBR(Method):
    """Restores by what stays in floating point longest what pruning and rounding took.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
        share: of the columns that are rounded first.
        damping: added to H's diagonal, as a multiple of its mean, outliers bounded.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    share: float = 0.5
    damping: float = 0.01

    stage = "quantize"

    def __post_init__(self) -> None:
        check_damping(self.damping, "quantize.damping")
        if not 0 < self.share < 1:
            raise UserError(f"share {self.share} leaves nothing to restore from", "quantize.share", "use e.g. 0.5")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrix, or the rows to take it from once they are rounded."""
        kind = "gram" if self.activations is None else "rows"
        return frozenset({kind}) | self._rounding.needs

    def misfit(self, columns: int) -> str:
        return self._rounding.misfit(columns)

    def misnamed(self, names: Sequence[str]) -> str:
        return self._rounding.misnamed(names)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        set_activation_grid(group, stats, self.activations)
        H = gram_for(stats, rest) if self.activations is None else run_time_gram(group, stats)
        curvature = Curvature.of(group, H, None, Problem(self.damping, "compressed", "float32", refit=True))
        for matrix in group:
            self._restore(matrix, curvature.least_squares(curvature.aim(matrix)))
        return stats

    def _restore(self, matrix: Matrix, problem: LeastSquares) -> None:
        """Two compensations and the rounding of one matrix."""
        grid, columns = self.weights, matrix.columns
        keep = torch.ones_like(problem.W, dtype=torch.bool) if matrix.keep is None else matrix.keep
        restored, _ = problem.refit(keep, problem.W * keep, LEAST_GAIN)
        levels = grid.fit(restored, matrix.scale_dtype)

        last = self._last_columns(columns, keep.device)
        rounded = torch.where(last, restored, grid.round(restored, levels))
        restored, _ = problem.refit(keep & last, rounded, LEAST_GAIN)
        levels = self._refitted(levels, restored, last, matrix.scale_dtype)
        matrix.quantize(QuantizedWeight(grid.quantize(restored, levels), levels, grid))

    def _last_columns(self, columns: int, device: torch.device) -> Tensor:
        """(in,) True for the columns that are rounded last."""
        return torch.arange(columns, device=device) >= round(self.share * columns)

    def _refitted(self, levels: Levels, weight: Tensor, last: Tensor, scale_dtype: torch.dtype) -> Levels:
        """``levels`` with those of groups that hold no column but the last fitted to ``weight`` (out, in)."""
        size = self.weights.group_size(weight.shape[1])
        free = last.view(-1, size).all(1)
        if not free.any():
            return levels
        fitted, zero = self.weights.fit(weight, scale_dtype), None
        if levels.zero_point is not None and fitted.zero_point is not None:
            zero = torch.where(free, fitted.zero_point, levels.zero_point)
        return Levels(torch.where(free, fitted.scale, levels.scale), zero)

    @property
    def _rounding(self) -> RTN:
        return RTN(self.weights, self.activations)
