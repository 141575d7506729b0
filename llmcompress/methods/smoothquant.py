"""SmoothQuant (Xiao et al., 2022, arXiv:2211.10438): move the activations' outliers into the weights.

    s_j = max|X_j|^α / max|W_:j|^(1−α),  X ← X / s,  W ← W · s

max|W_:j| is over all matrices that read the input. The division is folded into the norm that wrote it, so it is
free at run time; inputs that no norm writes (o_proj's and down_proj's in a Llama) keep theirs, as in the paper.

Departure: ``alpha: auto`` takes for each input the α, or none, with the least output error on held-back rows once the
steps that follow have rounded weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.smooth import migration_scale
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import Trials
from llmcompress.errors import UserError

#: what ``auto`` tries beside no smoothing, and what it is in the trials of an earlier step
AUTO_ALPHA = tuple(step / 20 for step in range(6, 20))
DRAFT_ALPHA = 0.8


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Migrates the difficulty of quantization from inputs to weights.

    Attributes:
        alpha: migration strength in [0, 1]; 0.5 shares it evenly; ``auto`` chooses it per input.
    """

    alpha: float | Literal["auto"] = 0.5

    stage = "smooth"

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha {self.alpha:g}", "smooth.alpha", "use a number from 0 to 1, or auto")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The range of the inputs; to choose α, the rows too."""
        return frozenset({"absmax", "rows"} if self.alpha == "auto" else {"absmax"})

    def draft(self) -> SmoothQuant:
        return self if self.alpha != "auto" else replace(self, alpha=DRAFT_ALPHA)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        if group.fold_refusal:  # the report names the reason
            return stats
        alpha = self._choose(group, stats, rest) if self.alpha == "auto" else self.alpha
        group.figures["alpha"] = alpha
        if alpha is not None:
            group.smooth(_scale(group, stats.absmax, alpha), stats)
        return stats

    def _choose(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...]) -> float | None:
        """The α with the least error on held-back rows, None for no smoothing; notes all errors."""
        if not any(method.stage == "quantize" for method in rest):
            raise UserError("alpha: auto weighs the errors of a quantize stage, and none follows", "smooth.alpha",
                            "give a number, or add a quantize stage")  # fmt: skip
        trials = Trials(group, stats, rest, number=1)  # one fit: only the steps that follow are fitted
        if not len(trials.fit):
            group.warnings.append(f"{group.name}: {stats.count} rows are too few to choose alpha; took {DRAFT_ALPHA}")
            return DRAFT_ALPHA
        errors: dict[float | None, float] = {None: float(trials.error().sum())}
        for alpha in AUTO_ALPHA:
            errors[alpha] = float(trials.error(smoothing=_scale(group, stats.absmax, alpha)).sum())
        group.figures["alpha_errors"] = {"none" if a is None else f"{a:g}": e for a, e in errors.items()}
        return min(errors, key=errors.__getitem__)


def _scale(group: MatrixGroup, absmax: Tensor, alpha: float) -> Tensor:
    """(in,) of all matrices that read the input."""
    return migration_scale(absmax, [m.weight for m in (*group.matrices, *group.bystanders)], alpha)
