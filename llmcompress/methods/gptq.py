"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): round column by column, later columns absorbing the errors.

Departures: one Cholesky factorisation instead of three (see `llmcompress.core.sweep`), shared by all matrices that read
the input. Weights that an earlier stage dropped stay zero and their loss is compensated by those that stay. With
act-order the scales of all groups are fixed first, in the original order, so that no index tensor has to be stored.

Where the inputs are rounded at run time, H is the Gram matrix of the smoothed and rounded rows, which is what the
rounded weights will multiply: this method then asks for the rows instead of their Gram matrix, for the same work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmcompress.core.compensate import LeastSquares
from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats, add_gram, mirror
from llmcompress.core.sweep import sweep
from llmcompress.core.targets import Mask, Round
from llmcompress.errors import UserError
from llmcompress.methods.curvature import Curvature
from llmcompress.methods.rtn import RTN, set_activation_grid


@dataclass(frozen=True)
class GPTQ(Method):
    """Rounds weights with error compensation, and notes how the inputs are rounded at run time.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
        act_order: take the columns of most active inputs first. Groups are then static.
        static_groups: fix every group's scale from the weights before the sweep, not from those adjusted by it.
        refit: solve for the weights that an earlier stage kept by least squares before they are rounded.
        damping: added to H's diagonal, as a multiple of its mean.
        target: whose outputs to meet: those of the weights on the compressed model's own inputs, or the dense model's.
        precision: of the factorisation.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    act_order: bool = False
    static_groups: bool = False
    refit: bool = False
    damping: float = 0.01
    target: Literal["compressed", "dense"] = "compressed"
    precision: Literal["float32", "float64"] = "float32"

    stage = "quantize"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrix, or the rows to take it from once they are rounded."""
        needs = {"gram"} if self.activations is None else {"rows"}
        if self.target == "dense":
            needs |= {"gram", "cross"}
        return frozenset(needs) | RTN(self.weights, self.activations).needs

    def misfit(self, columns: int) -> str:
        return RTN(self.weights, self.activations).misfit(columns)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        self.solve(group, stats, None)
        return stats

    def solve(self, group: MatrixGroup, stats: InputStats, sparsity: Sparsity | None) -> None:
        """Rounds the group's matrices, and prunes them in the same sweep if a ``sparsity`` is given.

        Raises:
            UserError: act-order with an N:M sparsity, whose groups are consecutive inputs.
        """
        if sparsity is not None and sparsity.m and self.act_order:
            raise UserError(f"act_order would tear the groups of {sparsity} apart", "quantize", "set act_order: false")
        set_activation_grid(group, stats, self.activations)
        H = stats.gram if self.activations is None else run_time_gram(group, stats)
        curvature = Curvature.of(group, stats, H, self.damping, self.target, self.precision)
        order = H.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        ordered = curvature if order is None else curvature.permuted(order)
        for matrix in group:
            if self.refit and matrix.keep is not None:
                problem = LeastSquares(curvature.aim(matrix), H, curvature.factor.ridge)
                matrix.weight, _ = problem.refit(matrix.keep, matrix.weight)
                matrix.aim = matrix.weight
            self._sweep(matrix, curvature.aim(matrix), ordered, order, sparsity)

    def _sweep(
        self, matrix: Matrix, W: Tensor, curvature: Curvature, order: Tensor | None, sparsity: Sparsity | None
    ) -> None:
        """Rounds one matrix, (out, in) ``W`` to be met, its columns taken in ``order``."""
        fitted = W if matrix.keep is None else matrix.weight
        mask = None
        if sparsity is not None:
            mask = Mask(sparsity, curvature.factor.V.diagonal(), len(W))
        elif matrix.keep is not None:
            mask = Mask.held(matrix.keep if order is None else matrix.keep[:, order])
        level_of = None if order is None else order // self.weights.group_size(matrix.columns)
        rounding = Round(self.weights, fitted, matrix.scale_dtype, mask, level_of, self.static_groups)
        Q = sweep(W if order is None else W[:, order], curvature.factor, mask, rounding)
        if order is not None:
            Q = Q[:, order.argsort()]
        if mask is not None:
            matrix.prune(mask.keep if order is None else mask.keep[:, order.argsort()])
        levels = rounding.levels
        matrix.quantize(QuantizedWeight(self.weights.quantize(Q, levels), levels, self.weights))


def run_time_gram(group: MatrixGroup, stats: InputStats) -> Tensor:
    """(in, in) Gram matrix per token of the rows as the group will see them: smoothed, then rounded."""
    total = torch.zeros(stats.width, stats.width, device=stats.rows[0].device)
    for x in stats.rows:
        add_gram(total, group.inputs_at_run_time(x.float()))
    return mirror(total.div_(max(stats.count, 1)))
