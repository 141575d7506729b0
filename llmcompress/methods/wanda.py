"""Wanda (Sun et al., 2023, arXiv:2306.11695): in each output row drop the weights with the
smallest |W_ij| · ‖X_j‖₂. Survivors keep their value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class Wanda(Method):
    """Drops the weights that carry the least activation energy."""

    sparsity: Sparsity

    stage = "prune"
    needs = frozenset({"squares"})
    by_rows = True

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        for matrix in group:
            keep = [self.sparsity.keep_mask(W.abs().mul_(stats.rms)) for W in matrix.row_parts()]  # (≤ out, in) each
            matrix.prune(torch.cat(keep), last=not rest)
        return stats
