"""SparseGPT and GPTQ in one sweep (SparseGPT, §3.5): each column is masked, what stays is rounded, and both errors are
absorbed by the columns to come. Recipes name the two stages; adjacent, they are joined into this."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.methods.gptq import GPTQ


@dataclass(frozen=True)
class SparseGPTQ(Method):
    """Prunes and rounds at once.

    Attributes:
        sparsity: as SparseGPT's.
        rounding: the quantize stage.
    """

    sparsity: Sparsity
    rounding: GPTQ

    stage = "quantize"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the quantize stage."""
        return self.rounding.needs

    def misfit(self, columns: int) -> str:
        return self.sparsity.misfit(columns) or self.rounding.misfit(columns)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        self.rounding.solve(group, stats, rest, self.sparsity)
        return stats
