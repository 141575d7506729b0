"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): round column by column, later columns absorbing the errors.

Departures: one Cholesky factorisation instead of three (see `llmcompress.core.sweep`), shared by all matrices that read
the input. Weights that an earlier stage dropped stay zero and their loss is compensated by those that stay. With
act-order the scales of all groups are fixed first, in the original order, so that no index tensor has to be stored.

Where the inputs are rounded at run time, H is the Gram matrix of the smoothed and rounded rows, which is what the
rounded weights will multiply: this method then asks for the rows instead of their Gram matrix, for the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import UPDATE_ENTRIES, InputStats, add_gram, mirror
from llmcompress.core.sweep import sweep
from llmcompress.core.targets import Mask, Round
from llmcompress.errors import UserError
from llmcompress.methods.curvature import Curvature, Problem, check_damping, gram_for
from llmcompress.methods.rtn import RTN, check_kinds, check_outputs, set_activation_grid, set_output_grids, unmatched


@dataclass(frozen=True)
class GPTQ(Method):
    """Rounds weights with error compensation, and notes how the inputs are rounded at run time.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
        quantize_outputs: matrices whose outputs are rounded too, as in `RTN`.
        act_order: take the columns of most active inputs first. Groups are then static.
        static_groups: fix every group's scale from the weights before the sweep, not from those adjusted by it.
        refit: solve for the weights that an earlier stage kept by least squares before they are rounded.
        damping: added to H's diagonal, as a multiple of its mean, outliers bounded.
        target: whose outputs to meet: those of the weights on the compressed model's own inputs, or the dense model's.
        precision: of the factorisation.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    quantize_outputs: tuple[str, ...] = ()
    act_order: bool = False
    static_groups: bool = False
    refit: bool = False
    damping: float = 0.1
    target: Literal["compressed", "dense"] = "compressed"
    precision: Literal["float32", "float64"] = "float32"

    stage = "quantize"

    def __post_init__(self) -> None:
        check_outputs(self.activations, self.quantize_outputs)
        check_kinds(self.weights, self.activations)
        check_damping(self.damping, "quantize.damping")
        if self.weights.kind == "nvfp4":
            raise UserError("nvfp4's outer scale is of weights before the sweep", "quantize", "use method: rtn")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrix, or the rows to take it from once they are rounded."""
        needs = {"gram"} if self.activations is None else {"rows"}
        if self.target == "dense":
            needs |= {"gram", "cross"}
        return frozenset(needs) | RTN(self.weights, self.activations).needs

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Where rows share no scale, and no random numbers."""
        return self.weights.group != "tensor" and self.weights.stochastic is None and not self.refit

    def misfit(self, columns: int) -> str:
        return RTN(self.weights, self.activations).misfit(columns)

    def misnamed(self, names: Sequence[str]) -> str:
        return unmatched(self.quantize_outputs, names)

    def draft(self) -> GPTQ:
        """Trials have one lane."""
        return self if self.target == "compressed" else replace(self, target="compressed")

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        self.solve(group, stats, rest, None)
        return stats

    def solve(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...], sparsity: Sparsity | None) -> None:
        """Rounds the group's matrices, and prunes them in the same sweep if a ``sparsity`` is given.

        Raises:
            UserError: act-order with an N:M sparsity, whose groups are consecutive inputs.
        """
        if sparsity is not None and sparsity.m and self.act_order:
            raise UserError(f"act_order would tear the groups of {sparsity} apart", "quantize", "set act_order: false")
        set_activation_grid(group, stats, self.activations)
        set_output_grids(group, self.quantize_outputs)
        problem = Problem(self.damping, self.target, self.precision, self.refit, self.act_order)
        H = self._gram(group, stats, rest)
        curvature = Curvature.of(group, H, self._cross(stats, H), problem)
        for matrix in group:
            if self.refit and matrix.keep is not None:
                least = curvature.least_squares(curvature.aim(matrix))
                refitted, _ = least.refit(curvature.ordered(matrix.keep), curvature.ordered(matrix.weight))
                matrix.aim = matrix.weight = curvature.restored(refitted)
            self._sweep(matrix, curvature, sparsity, last=not rest)

    def _cross(self, stats: InputStats, H: Tensor) -> Tensor | None:
        """(in, in) C of the dense target. What rounding the inputs takes is not aimed at: where they round to zero most
        of the time, hardly any weight would be large enough to bring it back, and its own rounding would be worse."""
        if self.target != "dense":
            return None
        return stats.cross if self.activations is None else H + stats.cross - stats.gram

    def _gram(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...]) -> Tensor:
        return gram_for(stats, rest) if self.activations is None else run_time_gram(group, stats)

    def _sweep(self, matrix: Matrix, curvature: Curvature, sparsity: Sparsity | None, last: bool) -> None:
        """Rounds one matrix."""
        mask, order = None, curvature.order
        if sparsity is not None:
            mask = Mask(sparsity, curvature.factor.V.diagonal(), len(matrix.weight))
        elif matrix.keep is not None:
            mask = Mask.held(curvature.ordered(matrix.keep))
        level_of = None if order is None else order // self.weights.group_size(matrix.columns)
        generator = self.weights.generator(matrix.name)

        def fitted(weight: Tensor) -> Round:
            return Round(self.weights, weight, matrix.scale_dtype, mask, level_of, self.static_groups, generator)

        if matrix.keep is None and (curvature.C is not None or bool(curvature.factor.dead.any())):
            W = curvature.aim(matrix, last)
            rounding = fitted(curvature.restored(W))
        else:  # before the aim takes the weights' memory
            rounding = fitted(matrix.weight)
            W = curvature.aim(matrix, last)
        Q = curvature.restored(sweep(W, curvature.factor, mask, rounding, out=W), overwrite=True)
        if mask is not None and sparsity is not None:
            matrix.prune(curvature.restored(mask.keep), Q)
        levels = rounding.levels
        matrix.quantize(QuantizedWeight(self.weights.quantize(Q, levels), levels, self.weights), out=Q)


def run_time_gram(group: MatrixGroup, stats: InputStats) -> Tensor:
    """(in, in) Gram matrix per token of the rows as the group will see them: smoothed, then rounded, in their dtype."""
    total = torch.zeros(stats.width, stats.width, device=stats.rows[0].device)
    for x in stats.rows:
        for part in x.split(max(UPDATE_ENTRIES // stats.width, 1)):
            add_gram(total, group.inputs_at_run_time(part).to(x.dtype))
    return mirror(total.div_(max(stats.count, 1)))
