"""JSQ, joint sparsification and quantization (Guo et al., ICML 2024): drop the weights whose removal costs little
activation energy and does not widen the range of the outputs that are to be quantized.

    score = |W_ij| · rms(X_j) + ρ · SS_ij,    SS_ij = max_t(Y_ti − X_tj W_ij) − min_t(Y_ti − X_tj W_ij)

Clipping, smoothing and rounding, the other steps of the paper, are stages of their own; its recipe is `jsq`.

Departures: SS is exact over all calibration tokens (the released code averages samples first); ρ is stated per
token, so that it means the same for any number and length of samples (the paper's 2.1 goes with ‖X_j‖ over
sequences of 2048 tokens divided by the number of sequences: 2.1 / √2048); ``rho: auto`` takes for each input the ρ
whose result, after the steps that follow, has the least output error on held-back rows, and 0 where none is clearly
better. (Averaging N samples shrinks their range about √N-fold, so the released code's ρ of 2.1 acts like
2.1 / √(2048 N) here.) SS is ranked without range(Y_i), which is common to a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.salience import CentredRows, averaged_samples, range_excess
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import Trials, clearly_least, stride
from llmcompress.errors import UserError
from llmcompress.methods.wanda import Wanda

#: the paper's ρ, per token, and what ``auto`` tries: shares of it, none to all
PAPER_RHO = 2.1 / math.sqrt(2048)
AUTO_RHO = (0.0, PAPER_RHO / 32, PAPER_RHO / 8, PAPER_RHO / 2, PAPER_RHO)


@dataclass(frozen=True)
class JSQ(Method):
    """Drops the weights that matter least to the outputs and to their range.

    Attributes:
        sparsity: how many.
        rho: weight of the range against the energy, per token; ``auto`` chooses it per input.
        average_samples: take the range over the mean of the samples, as the released code does, for comparison.
    """

    sparsity: Sparsity
    rho: float | Literal["auto"] = PAPER_RHO
    average_samples: bool = False

    stage = "prune"
    needs = frozenset({"squares", "rows"})

    def __post_init__(self) -> None:
        if self.rho != "auto" and not 0 <= self.rho < math.inf:
            raise UserError(
                f"rho {self.rho} is not a finite number ≥ 0", "prune.rho", "use auto; 0.0464 is the paper's"
            )

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns)

    def draft(self) -> Method:
        if self.rho == "auto":
            return Wanda(self.sparsity)  # which is JSQ with ρ = 0
        return replace(self, average_samples=False)  # trials see single tokens

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        try:
            rows = CentredRows(averaged_samples(stats) if self.average_samples else stats)
        except UserError as error:
            raise UserError(error.what, group.name, error.fix) from None
        excess = {m.name: range_excess(m.weight, rows) for m in group}  # (out, in) each
        rho = self._choose_rho(group, stats, rest, excess) if self.rho == "auto" else self.rho
        group.figures["rho"] = rho
        for matrix in group:
            self._prune(matrix, stats.rms, excess[matrix.name], rho)
        return stats

    def _prune(self, matrix: Matrix, rms: Tensor, excess: Tensor, rho: float) -> None:
        score = matrix.weight.abs() * rms + rho * excess  # (out, in)
        if matrix.keep is not None:
            score.masked_fill_(~matrix.keep, -math.inf)  # a score may be negative: what is gone counts first
        matrix.prune(self.sparsity.keep_mask(score))

    def _choose_rho(
        self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...], excess: dict[str, Tensor]
    ) -> float:
        """The ρ with the least error on held-back rows, 0 unless another is clearly better; notes all errors."""
        # one fit: the masks are of all rows, and only the steps that follow are fitted
        trials = Trials(group, stats, rest, number=1)
        if not len(trials.fit):
            group.warnings.append(f"{group.name}: {stats.count} rows are too few to choose rho; took 0")
            return 0.0
        rms = stats.rms

        def error(rho: float) -> Tensor:
            return trials.error(lambda m: self._prune(m, rms, excess[m.name][:: stride(len(excess[m.name]))], rho))

        errors = {rho: error(rho) for rho in AUTO_RHO}
        group.figures["rho_errors"] = {f"{rho:.2g}": float(e.sum()) for rho, e in errors.items()}
        return clearly_least(errors, plain=0.0)
