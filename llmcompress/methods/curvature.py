"""The curvature of a group's output error, and what its matrices should aim at: shared by the second-order methods."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.core.compensate import aim_at_dense
from llmcompress.core.group import Matrix, MatrixGroup
from llmcompress.core.stats import InputStats
from llmcompress.core.sweep import Factor, factorise
from llmcompress.errors import UserError


@dataclass(frozen=True)
class Curvature:
    """H of one input group, factored once for all the matrices that read it.

    Attributes:
        H: (in, in) Gram matrix per token.
        C: (in, in) cross-Gram of dense rows and rows minus the Gram of the rows, plus H; None to aim at the weights.
        factor: of the damped H.
    """

    H: Tensor
    C: Tensor | None
    factor: Factor

    @staticmethod
    def of(group: MatrixGroup, stats: InputStats, H: Tensor, damping: float, target: str, precision: str) -> Curvature:
        """Factors H; the damping used goes to the group's figures, and to its warnings if it had to be raised.

        Args:
            target: ``compressed`` or ``dense``: whose outputs `aim` meets.
            precision: ``float32`` or ``float64``, of the factorisation.
        """
        try:
            factor = factorise(H, damping, getattr(torch, precision))
        except UserError as error:
            raise UserError(error.what, group.name, error.fix) from None
        group.figures["damping"] = factor.damping
        if factor.damping > damping:
            group.warnings.append(
                f"{group.name}: H is not positive definite at damping {damping:g}; {factor.damping:g} was used"
            )
        return Curvature(H, stats.cross if target == "dense" else None, factor)

    def aim(self, matrix: Matrix) -> Tensor:
        """(out, in) what the matrix's output error is measured against: its weights before any pruning, moved to meet
        the dense model's outputs if so asked. Columns of dead inputs are zero."""
        W = matrix.weight if matrix.aim is None else matrix.aim
        if self.C is not None and not matrix.aims_at_dense:
            W = aim_at_dense(W, self.H, self.C, self.factor)
            matrix.aim, matrix.aims_at_dense = W, True
        return W.masked_fill(self.factor.dead, 0.0)

    def permuted(self, order: Tensor) -> Curvature:
        """The same with the inputs in another ``order`` (in,), factored anew with the damping that was needed."""
        factor = factorise(self.H[order][:, order], self.factor.damping, self.factor.V.dtype)
        return replace(self, factor=factor)
