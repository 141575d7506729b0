"""SmoothQuant (Xiao et al., 2022, arXiv:2211.10438): move the activations' outliers into the weights.

    s_j = max|X_j|^α / max|W_:j|^(1−α),  X ← X / s,  W ← W · s

max|W_:j| is over all matrices that read the input. The division is folded into the norm that wrote it, so it is
free at run time; inputs that no norm writes (o_proj's and down_proj's in a Llama) keep theirs, as in the paper."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.smooth import migration_scale
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Migrates the difficulty of quantization from inputs to weights.

    Attributes:
        alpha: migration strength in [0, 1]; 0.5 shares it evenly.
    """

    alpha: float = 0.5

    stage = "smooth"
    needs = frozenset({"absmax"})

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        if group.fold_refusal:  # the report names the reason
            return stats
        group.figures["alpha"] = self.alpha
        weights = [m.weight for m in (*group.matrices, *group.bystanders)]
        group.smooth(migration_scale(stats.absmax, weights, self.alpha), stats)
        return stats
