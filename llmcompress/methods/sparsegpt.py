"""SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): drop the weights with the smallest w² / [H⁻¹]_kk of those
left, column by column, later columns absorbing the errors.

Departures: one Cholesky factorisation instead of three (see `llmcompress.core.sweep`); mask counts are exact. Optional:
aiming at the dense model's outputs, a least-squares refit of what is kept, and moving zeros to better places
(see `llmcompress.core.compensate`). Followed by GPTQ, both become one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmcompress.core.block import BlockView
from llmcompress.core.compensate import LeastSquares
from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.core.sweep import sweep
from llmcompress.core.targets import Mask
from llmcompress.errors import UserError
from llmcompress.methods.curvature import Curvature, Problem, check_damping, gram_for
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.sparsegpt_gptq import SparseGPTQ


@dataclass(frozen=True)
class SparseGPT(Method):
    """Drops weights with error compensation.

    Attributes:
        sparsity: a ratio over 128 columns of all rows, or N:M.
        refit: solve for the kept weights by least squares after the sweep.
        grow: rounds in which 2 % of each row's zeros move to better places; needs ``refit``.
        damping: added to H's diagonal, as a multiple of its mean, outliers bounded.
        target: whose outputs to meet: those of the weights on the compressed model's own inputs, or the dense model's.
        precision: of the factorisation.
        ramp: by how much the ratio grows from the first weights of the model to the last, at the same total.
        ratios: one per block, the first block's first, in place of the sparsity, which is their mean over all weights;
            ``auto`` has them found by `llmcompress.sensitivity` before the walk.
    """

    sparsity: Sparsity
    refit: bool = False
    grow: int = 0
    damping: float = 0.1
    target: Literal["compressed", "dense"] = "compressed"
    precision: Literal["float32", "float64"] = "float32"
    ramp: float = 0.0
    ratios: tuple[float, ...] | Literal["auto"] = ()

    stage = "prune"

    def __post_init__(self) -> None:
        check_damping(self.damping, "prune.damping")
        if self.grow < 0:
            raise UserError(f"{self.grow} rounds", "prune.grow", "use 0 or more")
        if self.grow and not self.refit:
            raise UserError("zeros move by the residual of a refit", "prune.grow", "set refit: true")
        if self.ramp and self.ratios:
            raise UserError("both say how the ratio changes over the blocks", "prune.ramp and prune.ratios", "give one")
        self.sparsity.check_ramp(self.ramp)
        self.sparsity.check_ratios(self.ratios)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrix; for the dense target the cross-Gram too."""
        return frozenset({"gram", "cross"} if self.target == "dense" else {"gram"})

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Where the pattern does not compare rows, as a ratio over all of them does."""
        return bool(self.sparsity.m) and not self.refit

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns)

    def misplaced(self, before: Sequence[Method]) -> str:
        pruned = any(method.stage == "prune" for method in before)
        return "sparsegpt decides on all zeros itself" if pruned else super().misplaced(before)

    @property
    def uneven(self) -> bool:
        """Whether blocks have ratios of their own."""
        return bool(self.ramp or self.ratios)

    def misfit_blocks(self, shares: Sequence[float]) -> str:
        if not self.ratios or self.ratios == "auto":
            return ""
        if len(self.ratios) != len(shares):
            return f"{len(self.ratios)} sparsity ratios for {len(shares)} blocks"
        mean = sum(ratio * share for ratio, share in zip(self.ratios, shares, strict=True))
        wrong = abs(mean - self.sparsity.ratio) > 1e-3
        return f"the ratios are {mean:.4g} in the mean of all weights, not {self.sparsity}" if wrong else ""

    def for_block(self, view: BlockView) -> SparseGPT:
        """With the ratio of its place in the model."""
        if self.ratios == "auto":
            raise UserError("ratios are found before the walk", "prune.ratios", "compress with `llmcompress.compress`")
        if self.ratios:
            return replace(self, sparsity=Sparsity(self.ratios[view.index]), ratios=())
        return replace(self, sparsity=self.sparsity.ramped(self.ramp, view.span), ramp=0.0) if self.ramp else self

    def draft(self) -> SparseGPT:
        """Trials have one lane."""
        return self if self.target == "compressed" else replace(self, target="compressed")

    def join(self, following: Method) -> Method | None:
        """One sweep that prunes and rounds, if both steps solve the same problem."""
        if not isinstance(following, GPTQ) or self.refit or (following.act_order and self.sparsity.m):
            return None
        same = (self.damping, self.target, self.precision)
        return SparseGPTQ(self.sparsity, following) if _problem(following) == same else None

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        H, C = gram_for(stats, rest), stats.cross if self.target == "dense" else None
        curvature = Curvature.of(group, H, C, Problem(self.damping, self.target, self.precision, self.refit))
        del H
        for matrix in group:
            W = curvature.aim(matrix, last=not rest and not self.refit)
            mask = Mask(self.sparsity, curvature.factor.V.diagonal(), len(W))
            matrix.prune(mask.keep, sweep(W, curvature.factor, mask, out=None if self.refit else W))
            if self.refit:
                self._refit(matrix, curvature.least_squares(W))
        return stats

    def _refit(self, matrix: Matrix, problem: LeastSquares) -> None:
        """Least squares on the mask, which then is what a later quantizer aims at."""
        assert matrix.keep is not None
        keep = matrix.keep
        values, loss = problem.refit(keep, matrix.weight)
        for _ in range(self.grow):
            keep, values, loss = problem.drop_and_grow(keep, values, loss, self.sparsity.m)
        matrix.keep, matrix.weight, matrix.aim = keep, values, values


def _problem(method: GPTQ) -> tuple[float, str, str]:
    return method.damping, method.target, method.precision
