"""Channels that really go: the spaces of a network, what each keeps, and the smaller network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision.graph import ChannelGraph
from llmcompress.vision.network import logits
from llmcompress.vision.storage import set_widths

#: relative difference of the logits that sums of other lengths may cause
TOLERANCE = 1e-4
#: importances that compare channels of different layers: in units of the loss, or of what norms bring to one deviation
COMPARABLE = ("taylor", "taylor_bn", "bn")


@dataclass(frozen=True)
class ChannelOptions:
    """Which channels go.

    Attributes:
        ratio: of the budget that goes.
        budget: ``channels``, of which every space loses the same share, or the measured ``latency`` of the network, for
            which spaces lose what is worth least (HALP, see `llmcompress.vision.halp`).
        importance: how channels are compared (see `llmcompress.vision.importance`).
        multiple: a space keeps a multiple of so many, unless it has fewer.
        rounds: one-shot, or so many times a part, importances renewed in between.
        repair: the layers that read the channels are solved by least squares for what they gave out before.
        images: at once, whose latency counts where that is the budget.
        least: share of its channels that a space keeps at least where the latency is the budget; what has few left does
            not recover.
    """

    ratio: float = 0.5
    budget: Literal["channels", "latency"] = "channels"
    importance: Literal["l1", "l2", "bn", "taylor", "taylor_bn", "apoz", "thinet", "lasso", "random"] = "l2"
    multiple: int = 8
    rounds: int = 1
    repair: bool = False
    images: int = 64
    least: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"{self.ratio:g} is outside (0, 1)", "channels.ratio", "write a share such as 0.5")
        for key in ("multiple", "rounds", "images"):
            if getattr(self, key) < 1:
                raise UserError(f"{getattr(self, key)} is not positive", f"channels.{key}", "use 1 or more")
        if not 0 <= self.least <= 1:
            raise UserError(f"{self.least:g} is outside [0, 1]", "channels.least", "write a share such as 0.25")
        for key in ("images", "least") if self.budget == "channels" else ():
            if getattr(self, key) != getattr(ChannelOptions, key):
                raise UserError("no latency is measured", f"channels.{key}", "leave it out, or set budget: latency")
        if self.budget == "latency" and self.importance not in COMPARABLE:
            raise UserError(
                f"{self.importance} says nothing about channels of different layers", "channels.importance",
                f"use {', '.join(COMPARABLE)} with budget: latency",
            )  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Channels among which some may go: those written by the same layers.

    Attributes:
        name: of the first layer that writes them.
        layers: all that write them.
        units: (n,) labels of what goes at once: a channel, or the channels of a group.
        width: channels of one unit in its first layer.
        weights: that one unit holds, on average.
    """

    name: str
    layers: tuple[str, ...]
    units: Tensor
    width: int
    weights: int

    @property
    def channels(self) -> int:
        """Of the first layer."""
        return len(self.units) * self.width

    def kept(self, share: float, multiple: int) -> int:
        """Units that stay where ``share`` of them should: a multiple of ``multiple`` channels, at least one unit."""
        channels = share * len(self.units) * self.width
        if len(self.units) * self.width > multiple:
            channels = max(round(channels / multiple), 1) * multiple
        return min(max(round(channels / self.width), 1), len(self.units))


def spaces(module: nn.Module, graph: ChannelGraph) -> list[Space]:
    """The spaces of a network, in the order of its layers."""
    free, state = graph.removable(), module.state_dict()
    names: list[tuple[list[str], set[int], dict[int, int]]] = []
    for use in graph.uses:
        if use.role != "writes":
            continue
        counts: dict[int, int] = {}
        for label in use.labels.tolist():
            if label in free:
                counts[label] = counts.get(label, 0) + 1
        if not counts:
            continue
        joined = [entry for entry in names if entry[1] & counts.keys()]
        layers = [layer for entry in joined for layer in entry[0]] + [use.name.removesuffix(".weight")]
        units = set(counts).union(*(entry[1] for entry in joined))
        first = joined[0][2] if joined else counts
        names = [entry for entry in names if entry not in joined] + [(layers, units, {**counts, **first})]
    weights = _weights(graph, state)
    found = []
    for layers, units, counts in names:
        order = sorted(units)
        held = sum(weights.get(unit, 0) for unit in order) // len(order)
        found.append(Space(layers[0], tuple(layers), torch.tensor(order), counts[order[0]], held))
    position = {name: number for number, (name, _) in enumerate(module.named_modules())}
    return sorted(found, key=lambda space: position[space.name])


def _weights(graph: ChannelGraph, state: dict[str, Tensor]) -> dict[int, int]:
    found: dict[int, int] = {}
    for use in graph.uses:
        slice_size = state[use.name].numel() // state[use.name].shape[use.axis]
        for label in use.labels.tolist():
            found[label] = found.get(label, 0) + slice_size
    return found


@torch.no_grad()
def remove(module: nn.Module, graph: ChannelGraph, gone: Tensor) -> ChannelGraph:
    """Takes units out of a network, in place; returns its graph without them.

    Args:
        gone: (n,) labels.
    """
    uses = []
    for use in graph.uses:
        keep = ~torch.isin(use.labels, gone)
        owner, _, attribute = use.name.rpartition(".")
        layer = module.get_submodule(owner)
        if not bool(keep.all()):
            value = getattr(layer, attribute).detach().index_select(use.axis, keep.nonzero().flatten()).contiguous()
            if attribute in layer._buffers:
                layer._buffers[attribute] = value
            else:
                setattr(layer, attribute, nn.Parameter(value, requires_grad=False))
        uses.append(type(use)(use.name, use.axis, use.labels[keep], use.role))
    for name, rows in graph.groups.items():
        conv: Any = module.get_submodule(name.rpartition(".")[0])
        conv.groups = len(conv.weight) // rows
    for layer in module.modules():
        set_widths(layer)
    return ChannelGraph(uses, graph.groups)


@torch.no_grad()
def zeroed(module: nn.Module, graph: ChannelGraph, gone: Tensor) -> nn.Module:
    """A copy of the network in which nothing reads these units."""
    module = copy.deepcopy(module)
    state = dict(module.named_parameters())
    for use in graph.uses:
        if use.role == "reads":
            lost = torch.isin(use.labels, gone).nonzero().flatten()
            state[use.name].data.index_fill_(use.axis, lost, 0.0)
    return module


@torch.no_grad()
def remove_checked(module: nn.Module, graph: ChannelGraph, gone: Tensor, x: Tensor) -> tuple[ChannelGraph, float]:
    """`remove`, and the relative difference of its logits from those of the network where they are zeroed.

    Raises:
        UserError: they differ: the network computes with a number of channels that stands in its code.
    """
    reference = logits(zeroed(module, graph, gone), x)
    graph = remove(module, graph, gone)
    try:
        found = logits(module, x)
    except (RuntimeError, ValueError) as failure:
        raise UserError(
            f"does not run with fewer channels: {str(failure).strip().splitlines()[0][:120]}",
            type(module).__name__, "leave channels out, or exclude layers by targets",
        ) from None  # fmt: skip
    error = float((found - reference).norm() / reference.norm().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise UserError(
            f"removing channels is not zeroing them (relative difference {error:.1e})", type(module).__name__,
            "leave channels out",
        )  # fmt: skip
    return graph, error
