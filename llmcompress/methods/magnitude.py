"""Magnitude pruning (Han et al., 2015, arXiv:1506.02626): drop the weights with the smallest |W_ij|.

Compared within each output row, as the other methods here are, so that they differ in the score alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class Magnitude(Method):
    """Drops the smallest weights."""

    sparsity: Sparsity

    stage = "prune"

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        for matrix in group:
            keep = [self.sparsity.keep_mask(W.abs()) for W in matrix.row_parts()]
            matrix.prune(torch.cat(keep), last=not rest)
        return stats
