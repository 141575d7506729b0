"""OmniQuant (Shao et al., 2023, arXiv:2308.13137): learn, block by block, how far the weights' ranges are clipped and
how much of the inputs' range moves into the weights, so that the quantized block returns what the dense block does.

    clipping        scale from sigmoid(γ)·max W and sigmoid(β)·min W per row or group, γ and β from ln(2^bits − 1)
    transformation  X ← X / s,  W ← W · s  for inputs that a norm writes, s from SmoothQuant's
    loss            ‖ B(X; round(W · s)) − B(X; W) ‖², by AdamW, gradients straight through the rounding

Departures. The paper's clipping starts from 4, which is much the same at 6 bits, but costs several steps of an 8-bit
grid. s is learned as s₀·exp(θ), so that it stays positive and a step means the same for every input. Of the
transformation only these scales are learned: no shifts, not even where a norm has a bias they could go into, and no
scales of values or of queries and keys, whose folds are not known here. Every fifth of the calibration rows judges
instead of teaching: kept is what is best on those after an epoch, the start (SmoothQuant and rounding to nearest, not
clipped) included, and learning ends when three epochs bring nothing. The steps fall linearly to a tenth. Rows are
taken in order, so the same rows give the same result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmcompress.core.block import BlockView
from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods.lesson import Learned, Lesson, clipped_levels
from llmcompress.methods.rtn import RTN, set_activation_grid
from llmcompress.methods.smoothquant import SmoothQuant


@dataclass(frozen=True)
class OmniQuant(Method):
    """Smooths and rounds with scales and ranges learned on the block's output.

    Attributes:
        weights: grid of the weights.
        activations: grid of the inputs; None leaves them in floating point.
        alpha: migration strength of the scales that learning starts from; None starts without any.
        scales: learn the transformation.
        clips: learn the clipping.
        epochs: at most so many passes over the rows.
        samples: calibration rows taken, spread evenly over all; those that judge among them.
        batch: rows per step.
        scale_rate, clip_rate: step sizes of AdamW.
        clip_start: first γ and β, 4 in the paper; None for ln(2^bits − 1), which clips by half a step of the grid.
        target: whose outputs to meet: those of the dense block on the compressed model's own inputs, or the dense
            model's.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    alpha: float | None = 0.5
    scales: bool = True
    clips: bool = True
    epochs: int = 10
    samples: int = 20
    batch: int = 1  # type: ignore[assignment]
    scale_rate: float = 5e-3
    clip_rate: float = 1e-2
    clip_start: float | None = None
    target: Literal["compressed", "dense"] = "compressed"

    stage = "quantize"
    learns = True

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "samples": self.samples, "batch": self.batch}
        for key, value in counts.items():
            if value < 1:
                raise UserError(f"{value} {key}", f"quantize.{key}", "use 1 or more")
        if self.weights.observer != "minmax":
            raise UserError("omniquant learns the range itself", "quantize.weights", "leave the observer out")
        if not self.scales and not self.clips:
            raise UserError("nothing to learn", "quantize", "set scales: true or clips: true, or use method: rtn")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inputs' largest values, for the scales to start from; the dense model's rows, if they are aimed at."""
        return SmoothQuant().needs | self._rounding.needs | ({"cross"} if self.target == "dense" else frozenset())

    @property
    def smooths(self) -> bool:
        """If it starts from scales, or learns them."""
        return self.scales or self.alpha is not None

    def misfit(self, columns: int) -> str:
        return self._rounding.misfit(columns)

    def misplaced(self, before: Sequence[Method]) -> str:
        smoothed = any(method.smooths for method in before)
        return "omniquant learns the smoothing itself" if smoothed else super().misplaced(before)

    def draft(self) -> OmniQuant:
        """Trials have one lane."""
        return self if self.target == "compressed" else replace(self, target="compressed")

    def for_block(self, view: BlockView) -> Method:
        lesson = Lesson(self, view)
        lesson.learn()
        return LearnedQuant(self, lesson.learned(), lesson.figures)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        """What learning starts from: there is no block to learn on."""
        if self.alpha is not None:
            SmoothQuant(self.alpha).apply(group, stats)
        return self._rounding.apply(group, stats)

    @property
    def _rounding(self) -> RTN:
        return RTN(self.weights, self.activations)


@dataclass(frozen=True)
class LearnedQuant(Method):
    """OmniQuant for the groups of one block, learned.

    Attributes:
        recipe: what it was learned by.
        learned: by group name.
        figures: of the learning, for the report.
    """

    recipe: OmniQuant
    learned: dict[str, Learned]
    figures: dict[str, object]

    stage = "quantize"

    @property
    def weights(self) -> QuantGrid:
        """Grid of the weights."""
        return self.recipe.weights

    @property
    def activations(self) -> QuantGrid | None:
        """Grid of the inputs."""
        return self.recipe.activations

    def draft(self) -> Method:
        return self.recipe.draft()  # trials see some of a matrix's rows only

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        found = self.learned.get(group.name)
        if found is None:
            group.warnings.append(
                f"{group.name}: smoothed and rounded without learning, it cannot be tried in its block"
            )
            return self.recipe.apply(group, stats, rest)
        group.figures |= self.figures
        if found.scale is not None:
            group.smooth(found.scale, stats)
        set_activation_grid(group, stats, self.recipe.activations)
        grid = self.recipe.weights
        for matrix in group:
            levels = clipped_levels(grid, matrix.weight, found.clips.get(matrix.name), matrix.scale_dtype)
            matrix.quantize(QuantizedWeight(grid.quantize(matrix.weight, levels), levels, grid))
        return stats
