"""JSQ, joint sparsification and quantization (Guo et al., ICML 2024): drop the weights whose removal costs little
activation energy and does not widen the range of the outputs that are to be quantized.

    score = |W_ij| · rms(X_j) + ρ · SS_ij,    SS_ij = max_t(Y_ti − X_tj W_ij) − min_t(Y_ti − X_tj W_ij)

Clipping, smoothing and rounding, the other steps of the paper, are stages of their own; its recipe is `jsq`.

Departures: SS is exact over all calibration tokens (the released code averages samples first); ρ is stated per
token, so that it means the same for any number and length of samples (the paper's 2.1 goes with ‖X_j‖ over
sequences of 2048 tokens divided by the number of sequences: 2.1 / √2048); SS is ranked without range(Y_i), which
is common to a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.salience import CentredRows, range_excess
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError


@dataclass(frozen=True)
class JSQ(Method):
    """Drops the weights that matter least to the outputs and to their range.

    Attributes:
        sparsity: how many.
        rho: weight of the range against the energy, per token.
    """

    sparsity: Sparsity
    rho: float = 2.1 / math.sqrt(2048)

    stage = "prune"
    needs = frozenset({"squares", "rows"})

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise UserError(f"rho {self.rho} is not a finite number ≥ 0", "prune.rho", "0.0464 is the paper's")

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        rows = CentredRows(stats)
        for matrix in group:
            score = matrix.weight.abs() * stats.rms  # (out, in)
            score += self.rho * range_excess(matrix.weight, rows)
            if matrix.keep is not None:
                score.masked_fill_(~matrix.keep, -math.inf)  # a score may be negative: what is gone counts first
            matrix.prune(self.sparsity.keep_mask(score))
        return stats
