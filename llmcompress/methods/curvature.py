"""The curvature of a group's output error, and what its matrices should aim at: shared by the second-order methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.compensate import LeastSquares, aim_at_dense
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.core.sweep import Factor, factorise
from llmcompress.errors import UserError


def check_damping(damping: float, where: str) -> None:
    """Raises UserError unless it is above 0, from where it can be raised."""
    if not damping > 0:
        raise UserError(f"damping {damping:g}", where, "use a number above 0, such as 0.01")


@dataclass(frozen=True)
class Problem:
    """Which problem a second-order step solves.

    Attributes:
        damping: added to H's diagonal, as a multiple of its mean, outliers bounded.
        target: ``compressed`` or ``dense``: whose outputs are met.
        precision: ``float32`` or ``float64``, of the factorisation.
        refit: H is needed for least squares, too.
        act_order: take the columns of most active inputs first.
    """

    damping: float
    target: str
    precision: str
    refit: bool
    act_order: bool = False


@dataclass(frozen=True)
class Curvature:
    """H of one input group, factored once for all the matrices that read it.

    Attributes:
        factor: of the damped H.
        order: (in,) columns in the order in which they are taken, as in H, C and the factor; None for their own.
        H: (in, in) Gram matrix per token; None where only its factor is needed.
        C: (in, in) cross-Gram of the dense rows and the rows; None to aim at the weights.
    """

    factor: Factor
    order: Tensor | None
    H: Tensor | None
    C: Tensor | None

    @staticmethod
    def of(group: MatrixGroup, H: Tensor, C: Tensor | None, problem: Problem) -> Curvature:
        """Factors H; the damping used goes to the group's figures, and to its warnings if it had to be raised.

        Args:
            H: (in, in), the caller's no longer.
            C: (in, in) for the dense target, the caller's no longer.
        """
        order = None
        if problem.act_order:
            order = H.diagonal().argsort(descending=True, stable=True)
            for matrix in (H,) if C is None else (H, C):
                reorder(reorder(matrix, order, 1), order, 0)
        again = problem.refit or C is not None
        try:
            factor = factorise(H, problem.damping, getattr(torch, problem.precision), overwrite=not again)
        except UserError as error:
            raise UserError(error.what, group.name, error.fix) from None
        group.figures["damping"] = factor.damping
        if factor.damping > problem.damping:
            group.warnings.append(
                f"{group.name}: H is not positive definite at damping {problem.damping:g}; {factor.damping:g} was used"
            )
        return Curvature(factor, order, H if again else None, C)

    def aim(self, matrix: Matrix, last: bool = False) -> Tensor:
        """(out, in) what the matrix's output error is measured against, to be overwritten: its weights before any
        pruning, moved to meet the dense model's outputs if so asked. Columns in order; those of dead inputs are zero.

        Args:
            last: nobody reads the matrix's present weights any more; where no others are needed, it is they.
        """
        if last and self.C is None and matrix.aim is None:
            own = matrix.weight if self.order is None else reorder(matrix.weight, self.order, 1)
            own[:, self.factor.dead] = 0.0
            return own
        W = self.ordered(matrix.weight if matrix.aim is None else matrix.aim)
        if self.C is not None and self.H is not None and not matrix.aims_at_dense:
            W = aim_at_dense(W, self.H, self.C, self.factor)
            matrix.aim, matrix.aims_at_dense = self.restored(W).clone(), True
        W[:, self.factor.dead] = 0.0
        return W

    def least_squares(self, W: Tensor) -> LeastSquares:
        """The problem of the kept weights' values; ``W`` (out, in) in order."""
        assert self.H is not None
        return LeastSquares(W, self.H, self.factor.ridge)

    def ordered(self, columns: Tensor) -> Tensor:
        """A copy of (out, in), its columns in the order in which they are taken."""
        return columns.clone() if self.order is None else columns[:, self.order]

    def restored(self, columns: Tensor, overwrite: bool = False) -> Tensor:
        """Columns (out, in) back from the order in which they are taken, in their own memory if that may be."""
        if self.order is None:
            return columns
        back = self.order.argsort()
        return reorder(columns, back, 1) if overwrite else columns[:, back]


def gram_for(stats: InputStats, rest: Iterable[Method]) -> Tensor:
    """(in, in) H to be overwritten; where none of the steps that follow reads it, in the memory of the statistics."""
    return stats.gram if any("gram" in method.needs for method in rest) else stats.take_gram()


def reorder(matrix: Tensor, order: Tensor, axis: int, width: int = 512) -> Tensor:
    """Puts what lies along an ``axis`` of ``matrix`` in ``order``, in its own memory, some at a time: gathering is fast
    within the cache."""
    for part in matrix.split(width, 1 - axis):
        part.copy_(part.index_select(axis, order))
    return matrix
