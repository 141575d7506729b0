"""How many channels each space keeps: the same share everywhere, or what fits a latency and is worth most.

The latency of a choice is that of its layers, as measured one by one at the sizes chosen, and of all between them
(sums, pooling, Python), which is taken for a line in the number of entries that layers put out, through the dense
network and the thinnest one. What is chosen is then measured as a network; if it is off, the budget moves as much, and
then by halves between what was too slow and what was too fast."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision.channels import ChannelOptions, Space, remove
from llmcompress.vision.fold import fold_norms
from llmcompress.vision.graph import ChannelGraph
from llmcompress.vision.halp import Cost, knapsack
from llmcompress.vision.latency import LatencyTable, Shape, layer_calls

#: sizes that a space may take, at most
SIZES = 8
#: knapsacks until the measured latency is near enough, and how near that is, as a share of the target
TRIES, NEAR, PROMISED = 8, 0.04, 0.10


def lowest(spaces: Sequence[Space], scores: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
    """(n,) labels of the units that go, where each space keeps so many of the highest scores."""
    return torch.cat([
        space.units[score.argsort(stable=True)[: len(space.units) - count]]
        for space, score, count in zip(spaces, scores, kept, strict=True)
    ])  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """The channels along one axis of a layer's weight.

    Attributes:
        fixed: that cannot go.
        of: channels that one unit of a space has here, by the number of the space.
    """

    fixed: int
    of: dict[int, int]

    def count(self, kept: dict[int, int]) -> int:
        """Channels where each space keeps so many units."""
        return self.fixed + sum(each * kept[space] for space, each in self.of.items())


class LatencyBudget:
    """A share of the latency of a network.

    Args:
        dense: whose latency is the whole.
        wanted: options of the removal.
        pixels: (N, C, H, W) some images; as many as ``wanted.images`` are made of them.
        table: of latencies measured so far.
        folds: whether norms are folded before the network is used.
    """

    def __init__(
        self, dense: nn.Module, wanted: ChannelOptions, pixels: Tensor, table: LatencyTable, folds: bool
    ) -> None:
        self.wanted, self.table, self.folds = wanted, table, folds
        self.x = pixels[torch.arange(wanted.images) % len(pixels)]
        self.dense = self._deployed(dense)
        self._first: dict[str, Space] = {}
        self.report: dict[str, Any] = {}
        self.warnings: list[str] = []

    def choose(
        self, module: nn.Module, graph: ChannelGraph, spaces: Sequence[Space], scores: Sequence[Tensor], share: float
    ) -> list[int]:
        """Units that each space keeps, so that the network takes a share of the dense one's latency.

        Raises:
            UserError: it cannot become that fast.
        """
        sizes = [self._sizes(space) for space in spaces]
        worth = [
            s.double().sort(descending=True).values.cumsum(0)[torch.tensor(n) - 1]
            for s, n in zip(scores, sizes, strict=True)
        ]

        def measured(choice: Sequence[int]) -> tuple[float, float]:
            kept = [n[k] for n, k in zip(sizes, choice, strict=True)]
            smaller = copy.deepcopy(module)
            remove(smaller, graph, lowest(spaces, scores, kept))
            return self.table.networks(self.dense, self._deployed(smaller), self.x)

        thinnest, whole = [0] * len(sizes), [len(n) - 1 for n in sizes]
        seconds, least = measured(thinnest)
        cost = self._cost(
            module, graph, spaces, sizes, (thinnest, least * seconds), (whole, measured(whole)[1] * seconds)
        )
        budget, tried = share * seconds, dict[tuple[int, ...], float]()
        low, high = 0.0, math.inf
        for _ in range(TRIES):
            choice = knapsack(worth, cost, budget)
            if choice is None:
                break
            tried[tuple(choice)] = found = measured(choice)[1]
            if abs(found / share - 1) <= NEAR:
                break
            low, high = (budget, high) if found < share else (low, budget)
            budget = math.sqrt(low * high) if 0 < low < high < math.inf else budget * share / found
        if not tried:
            raise UserError(
                f"the network cannot be made that fast: at its thinnest it takes {least:.0%} of the dense latency",
                "channels.ratio", "ask for less, or set a smaller channels.least or channels.multiple",
            )  # fmt: skip
        best = min(tried, key=lambda choice: abs(tried[choice] - share))
        self._report(seconds, share, cost.of(best) / seconds, tried[best], least)
        return [n[k] for n, k in zip(sizes, best, strict=True)]

    def _report(self, seconds: float, share: float, predicted: float, measured: float, least: float) -> None:
        self.report = {
            "images": self.wanted.images, "threads": torch.get_num_threads(), "dense_seconds": seconds,
            "target": share, "predicted": predicted, "measured": measured, "thinnest": least,
        }  # fmt: skip
        self.warnings = []
        if abs(measured / share - 1) > PROMISED:
            self.warnings.append(f"latency: {measured:.0%} of the dense network's, {share:.0%} were asked for")

    def _deployed(self, module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        if self.folds:
            fold_norms(module, self.x[:2])
        return module

    def _sizes(self, space: Space) -> list[int]:
        """Ascending numbers of units that a space may keep, of those it may keep in the first round."""
        first = self._first.setdefault(space.name, space)
        shares = (step / SIZES for step in range(1, SIZES))
        steps = {first.kept(share, self.wanted.multiple) for share in shares if share >= self.wanted.least}
        return sorted({size for size in steps if size < len(space.units)} | {len(space.units)})

    def _cost(
        self, module: nn.Module, graph: ChannelGraph, spaces: Sequence[Space], sizes: list[list[int]],
        *known: tuple[list[int], float],
    ) -> Cost:  # fmt: skip
        """Of the layers by the table, and of the rest by a line through two networks: their choice and seconds."""
        layers = _layers(module, graph, spaces, self.x)
        asked: set[Shape] = set()

        def note(shape: Shape) -> float:
            asked.add(shape)
            return 0.0

        for layer in layers:
            layer.add_to(Cost([torch.zeros(len(n)).double() for n in sizes]), sizes, note)
        self.table.fill(asked)
        cost, entries = (Cost([torch.zeros(len(n)).double() for n in sizes]) for _ in range(2))
        for layer in layers:
            layer.add_to(cost, sizes, self.table.__getitem__)
            layer.add_entries_to(entries, sizes)
        (thin, first), (thick, last) = known
        rest = first - cost.of(thin), last - cost.of(thick)
        slope = (rest[1] - rest[0]) / max(entries.of(thick) - entries.of(thin), 1.0)
        cost.constant += rest[0] - slope * (entries.of(thin) - entries.constant)
        for single, count in zip(cost.single, entries.single, strict=True):
            single += slope * count
        return cost


@dataclass(frozen=True)
class _Layer:
    """One call of a layer.

    Attributes:
        shape: at present.
        inputs, outputs: channels; those of a convolution with groups are counted by its outputs.
        rows: outputs of one group; 0 where there are no groups.
        entries: put out for each output channel.
    """

    shape: Shape
    inputs: Axis
    outputs: Axis
    rows: int
    entries: float

    def at(self, inputs: dict[int, int], outputs: dict[int, int]) -> Shape:
        """The shape where spaces keep so many units on either side."""
        out = self.outputs.count(outputs)
        if self.rows:
            groups = out // self.rows
            return replace(
                self.shape, outputs=out, groups=groups, inputs=groups * (self.shape.inputs // self.shape.groups)
            )
        return replace(self.shape, outputs=out, inputs=self.inputs.count(inputs))

    def add_entries_to(self, entries: Cost, sizes: list[list[int]]) -> None:
        """Adds the entries it puts out at all sizes."""
        outs = sorted(self.outputs.of)
        entries.add(outs, _over(outs, sizes, lambda kept: self.entries * self.outputs.count(kept)))

    def add_to(self, cost: Cost, sizes: list[list[int]], seconds: Callable[[Shape], float]) -> None:
        """Adds its latency at all sizes; inputs of several spaces, joined by concatenation, count one by one."""
        ins, outs = set(self.inputs.of), set(self.outputs.of)
        if len(ins | outs) <= 2:
            joint = sorted(ins | outs)
            cost.add(joint, _over(joint, sizes, lambda kept: seconds(self.at(kept, kept))))
            return
        full = {s: sizes[s][-1] for s in ins | outs}
        cost.add(sorted(outs), _over(sorted(outs), sizes, lambda kept: seconds(self.at(full, kept))))
        for s in ins:
            joint = sorted({s} | outs)

            def saved(kept: dict[int, int], s: int = s) -> float:
                return seconds(self.at({**full, s: kept[s]}, kept)) - seconds(self.at(full, kept))

            cost.add(joint, _over(joint, sizes, saved))


def _over(spaces: Sequence[int], sizes: list[list[int]], value: Callable[[dict[int, int]], float]) -> Tensor:
    """A float64 table over the sizes of some spaces."""
    grid = torch.cartesian_prod(*(torch.tensor(sizes[s]) for s in spaces)) if spaces else torch.zeros(1, 0)
    rows = grid.view(len(grid), -1).long().tolist()
    values = [value(dict(zip(spaces, row, strict=True))) for row in rows]
    return torch.tensor(values, dtype=torch.float64).view([len(sizes[s]) for s in spaces])


def _layers(module: nn.Module, graph: ChannelGraph, spaces: Sequence[Space], x: Tensor) -> list[_Layer]:
    uses = {(use.name, use.axis): use for use in graph.uses if use.role in ("reads", "writes")}
    owner = {unit: s for s, space in enumerate(spaces) for unit in space.units.tolist()}
    found = []
    for name, shape, entries in layer_calls(module, x):
        key, axes = f"{name}.weight", list[Axis]()
        for axis, count in ((1, shape.inputs), (0, shape.outputs)):
            use = uses.get((key, axis))
            numbers = [] if use is None else [owner.get(label, -1) for label in use.labels.tolist()]
            of = {s: numbers.count(s) // len(spaces[s].units) for s in set(numbers) - {-1}}
            axes.append(Axis(count - sum(each * len(spaces[s].units) for s, each in of.items()), of))
        grouped = graph.groups.get(key, 0)
        inputs = Axis(0, {}) if grouped else axes[0]
        found.append(_Layer(shape, inputs, axes[1], grouped, entries / shape.outputs))
    return found
