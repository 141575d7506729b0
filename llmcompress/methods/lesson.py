"""Learning scales and ranges on the output of one block: the training loop of OmniQuant (see `methods.omniquant`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.core.block import BlockGroup, BlockView, Transform
from llmcompress.core.grid import Levels, QuantGrid
from llmcompress.core.smooth import migration_scale
from llmcompress.core.straight_through import round_through

if TYPE_CHECKING:
    from llmcompress.methods.omniquant import OmniQuant

#: one of so many micro-batches judges
JUDGES = 5
#: epochs without an improvement by MARGIN, after which learning ends
PATIENCE, MARGIN = 3, 1e-3


@dataclass(frozen=True)
class Learned:
    """Of one group.

    Attributes:
        scale: (in,) s; None if the inputs stay as they are.
        clips: by matrix name, the shares of the lowest and of the highest weight that are kept, (rows or 1, G) each.
    """

    scale: Tensor | None
    clips: dict[str, tuple[Tensor, Tensor]]


def clipped_levels(
    grid: QuantGrid, weight: Tensor, shares: tuple[Tensor, Tensor] | None, scale_dtype: torch.dtype
) -> Levels:
    """The grid over the kept ``shares`` of the weight's lowest and highest values; over all if None."""
    low, high = grid.bounds(weight)
    if shares is not None:
        low, high = low * shares[0], high * shares[1]
    return grid.levels(low, high, scale_dtype)


@dataclass
class _Group:
    """What is learned of a group, and what it starts from."""

    known: BlockGroup
    low: Tensor  # (in,) of the inputs, at most 0
    high: Tensor
    start: Tensor | None  # (in,) s₀; None if the inputs stay as they are
    theta: Tensor | None = None  # (in,) log of s over s₀
    gamma: dict[str, Tensor] = field(default_factory=dict)  # (2 or 1, rows or 1, G) by matrix name

    def scale(self) -> Tensor | None:
        return self.start if self.start is None or self.theta is None else self.start * self.theta.exp()

    def clips(self, name: str) -> tuple[Tensor, Tensor] | None:
        shares = self.gamma[name].sigmoid() if name in self.gamma else None
        return None if shares is None else (shares[0], shares[-1])


class Lesson:
    """Learning on one block.

    Attributes:
        figures: for the report.
    """

    def __init__(self, recipe: OmniQuant, view: BlockView) -> None:
        self.recipe, self.view = recipe, view
        count = min(view.batches, -(-recipe.samples // recipe.batch))
        taken = [i * view.batches // count for i in range(count)]
        self.judges = taken[::JUDGES]
        self.pupils = [i for i in taken if i not in self.judges] or taken
        self.aims = {i: view.aim(i) for i in taken}
        self.groups = self._observed(taken)
        self.figures: dict[str, object] = {}

    def learned(self) -> dict[str, Learned]:
        """The present state by group name."""
        return {
            g.known.name: Learned(g.scale(), {n: c for n in g.gamma if (c := g.clips(n)) is not None})
            for g in self.groups
        }

    def error(self, batch: int) -> Tensor:
        """Mean squared difference from the dense output, a scalar that gradients flow from."""
        weights, inputs = {}, {}
        for group in self.groups:
            s = group.scale()
            inputs[group.known.name] = self._at_run_time(group, s)
            for name, weight in group.known.weights.items():
                W = weight if s is None else weight * s
                levels = clipped_levels(self.recipe.weights, W, group.clips(name), self.view.scale_dtype)
                weights[name] = round_through(self.recipe.weights, W, levels)
        return (self.view.run(batch, weights, inputs) - self.aims[batch]).square().mean()

    def learn(self) -> None:
        """Leaves the groups in the best state that was seen."""
        start = self._judged()
        if not start > 0 or not any(g.start is not None or self.recipe.clips for g in self.groups):
            return
        best, kept, lowest, stale, epoch = start, self._state(), math.inf, 0, 0
        steps = self._descent(start)
        for epoch in range(1, self.recipe.epochs + 1):
            for batch in self.pupils:
                next(steps)(batch)
            now = self._judged()
            stale, lowest = (0, now) if now < lowest * (1 - MARGIN) else (stale + 1, lowest)
            if now < best:
                best, kept = now, self._state()
            self.view.note(f"epoch {epoch}, error {now / start:.3f} of the start's")
            if stale == PATIENCE:
                break
        self.groups = kept
        self.figures = {"block_error_start": start, "block_error_learned": best, "epochs": epoch}

    def _descent(self, start: float) -> Iterator[Callable[[int], None]]:
        """Gives the parameters their first values, and then one step after the other."""
        recipe, scales, clips = self.recipe, [], []
        first = math.log(2**recipe.weights.bits - 1) if recipe.clip_start is None else recipe.clip_start
        for group in self.groups:
            if group.start is not None and recipe.scales:
                group.theta = torch.zeros_like(group.start, requires_grad=True)
                scales.append(group.theta)
            for name, weight in group.known.weights.items() if recipe.clips else ():
                low = recipe.weights.bounds(weight)[0]
                sides = 1 if recipe.weights.symmetric else 2
                group.gamma[name] = torch.full((sides, *low.shape), first, device=low.device, requires_grad=True)
                clips.append(group.gamma[name])
        rates = [{"params": scales, "lr": recipe.scale_rate}, {"params": clips, "lr": recipe.clip_rate}]
        optimizer = torch.optim.AdamW([rate for rate in rates if rate["params"]], weight_decay=0.0)
        total = recipe.epochs * len(self.pupils)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total)

        def step(batch: int) -> None:
            with torch.enable_grad():
                (self.error(batch) / start).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        while True:
            yield step

    @torch.no_grad()
    def _judged(self) -> float:
        return sum(float(self.error(batch)) for batch in self.judges) / len(self.judges)

    def _state(self) -> list[_Group]:
        return [
            replace(
                g,
                theta=None if g.theta is None else g.theta.detach().clone(),
                gamma={name: value.detach().clone() for name, value in g.gamma.items()},
            )
            for g in self.groups
        ]

    def _observed(self, taken: list[int]) -> list[_Group]:
        """The groups with the ranges of their inputs in the dense block."""
        ranges: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(name: str) -> Transform:
            def note(x: Tensor) -> Tensor:
                rows = x.detach().reshape(-1, x.shape[-1]).float()
                zero = rows.new_zeros(rows.shape[-1])
                low, high = ranges.get(name, (zero, zero))
                if len(rows):
                    ranges[name] = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
                return x

            return note

        with torch.no_grad():
            for batch in taken:
                self.view.run(batch, {}, {g.name: watch(g.name) for g in self.view.groups})
        return [self._group(g, *ranges[g.name]) for g in self.view.groups if g.name in ranges]

    def _group(self, known: BlockGroup, low: Tensor, high: Tensor) -> _Group:
        start = None
        if known.folds and self.recipe.alpha is not None:
            weights = [*known.weights.values(), *known.bystanders]
            start = migration_scale(torch.maximum(-low, high), weights, self.recipe.alpha)
        elif known.folds and self.recipe.scales:
            start = torch.ones_like(low)
        return _Group(known, low, high, start)

    def _at_run_time(self, group: _Group, s: Tensor | None) -> Transform:
        """What becomes of the group's inputs: divided, then rounded."""
        grid = self.recipe.activations if group.known.rounds_inputs else None

        def transform(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).float()
            rows = rows if s is None else rows / s
            if grid is not None:
                levels = grid.fit(rows, x.dtype) if grid.dynamic else self._static_levels(grid, group, s)
                rows = round_through(grid, rows, levels)
            return rows.view_as(x).to(x.dtype)

        return transform

    def _static_levels(self, grid: QuantGrid, group: _Group, s: Tensor | None) -> Levels:
        low, high = (bound if s is None else bound / s for bound in (group.low, group.high))
        return grid.levels(low.amin().view(1, 1), high.amax().view(1, 1), self.view.scale_dtype)
