"""Layer-wise calibration after pruning (Lazarevich et al., 2021, arXiv:2104.15023): whatever chose the zeros, the
weights that stay are tuned to give each layer's dense outputs on the calibration's inputs,

    min over Q with zeros where the mask has them   ‖W X̄ − Q X‖²

Departure: the paper descends by gradients; here conjugate gradients solve the least squares (see
`llmcompress.core.compensate`). Its correction of biases is the recipe's `bias_correction`, where layers have biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.methods.curvature import Curvature, Problem, check_damping, gram_for


@dataclass(frozen=True)
class Refit(Method):
    """Solves for the weights that earlier steps kept; leaves matrices without zeros of theirs as they are.

    Attributes:
        target: whose outputs to meet: those of the dense weights on the compressed model's own inputs (X̄ = X), or the
            dense model's.
        damping: added to the diagonal of XᵀX, as a multiple of its mean, outliers bounded.
        precision: of the factorisation.
    """

    target: Literal["compressed", "dense"] = "dense"
    damping: float = 0.01
    precision: Literal["float32", "float64"] = "float32"

    stage = "prune"

    def __post_init__(self) -> None:
        check_damping(self.damping, "prune.damping")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrix; for the dense target the cross-Gram too."""
        return frozenset({"gram", "cross"} if self.target == "dense" else {"gram"})

    def draft(self) -> Refit:
        """Trials have one lane."""
        return self if self.target == "compressed" else replace(self, target="compressed")

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        if all(matrix.keep is None for matrix in group):
            return stats
        H, C = gram_for(stats, rest), stats.cross if self.target == "dense" else None
        curvature = Curvature.of(group, H, C, Problem(self.damping, self.target, self.precision, refit=True))
        for matrix in group:
            if matrix.keep is not None:
                problem = curvature.least_squares(curvature.aim(matrix))
                matrix.weight, _ = problem.refit(matrix.keep, matrix.weight)
                matrix.aim = matrix.weight
        return stats
