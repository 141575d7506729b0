"""Cross-layer range equalisation (Nagel et al., 2019, arXiv:1906.04721): where a positive factor passes from one layer
to the next, as it does through ReLU, each channel's weights on both sides are given the same range.

    s_i = √(r¹_i / r²_i),   W¹_i / s_i,   b¹_i / s_i,   W²_·i · s_i,   r the largest |w| of a channel

Pairs are found in the exported graph: the next layer that reads what one writes, a depthwise convolution among them.
Each is accepted only if the network's outputs stay what they were under random factors from 1/64 to 64, which ReLU6, a
norm, a shortcut and a second reader do not let pass. Departures: biases that grow are not absorbed into the next layer
(the walk corrects their means); all pairs are renewed in turn until the factors settle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcompress.vision.fold import TOLERANCE
from llmcompress.vision.graph import ChannelGraph, Use, channel_graph
from llmcompress.vision.labels import FREE, FROZEN
from llmcompress.vision.network import logits

#: rounds over all pairs, and the factor nearest to 1 that makes another worth while
ROUNDS, SETTLED = 50, 1.001
#: largest exponent of two that a pair is tried with
EXPONENT = 6


@dataclass
class Equalised:
    """What was equalised.

    Attributes:
        pairs: (writer, reader) names.
        refused: pairs that no factor passes, ``writer → reader``.
        error: ‖after − before‖ / ‖before‖ of the logits.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    error: float = 0.0


@dataclass
class _Pair:
    """Two layers, one of which reads the channels that the other writes.

    Attributes:
        units: channels that may have factors of their own.
        written, read: (outputs of the writer,) and (inputs of the reader,) which unit each is.
    """

    writer: str
    reader: str
    first: nn.Module
    second: nn.Module
    units: int
    written: Tensor
    read: Tensor

    def ranges(self) -> tuple[Tensor, Tensor]:
        """(units,) largest |w| on either side."""
        by_output = self.first.get_parameter("weight").abs().flatten(1).amax(1)
        by_input = _by_input(self.second).abs().amax((1, 3)).flatten()
        zeros = torch.zeros(self.units)
        return (
            zeros.scatter_reduce(0, self.written, by_output, "amax"),
            zeros.scatter_reduce(0, self.read, by_input, "amax"),
        )

    def scale(self, s: Tensor) -> None:
        """Divides the outputs of the writer by ``s`` (units,), and makes up for it in the reader."""
        weight, bias = self.first.get_parameter("weight"), self.first.bias
        weight.data.div_(s[self.written].view(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.data.div_(s[self.written])  # type: ignore[operator]
        inputs = _by_input(self.second)
        inputs.mul_(s[self.read].view(inputs.shape[0], 1, inputs.shape[2], 1))


@torch.no_grad()
def equalise(module: nn.Module, x: Tensor, seed: int) -> Equalised:
    """Equalises every pair that lets factors pass, in place.

    Args:
        module: in evaluation mode, its norms folded.
        x: (N, C, H, W) at least two images, on which each pair is verified.

    Raises:
        UserError: the network cannot be traced.
    """
    before = logits(module, x)
    scale = before.norm().clamp(min=1e-30)
    generator = torch.Generator().manual_seed(seed)
    found, taken = Equalised(), []
    for pair in _pairs(module, channel_graph(module, x)):
        s = torch.exp2(torch.randint(-EXPONENT, EXPONENT + 1, (pair.units,), generator=generator).float())
        pair.scale(s)
        passes = bool((logits(module, x) - before).norm() / scale <= TOLERANCE)
        pair.scale(1 / s)  # powers of two: exactly what it was
        if passes:
            taken.append(pair)
            found.pairs.append((pair.writer, pair.reader))
        else:
            found.refused.append(f"{pair.writer} → {pair.reader}")
    for _ in range(ROUNDS):
        most = 1.0
        for pair in taken:
            written, read = pair.ranges()
            alive = (written > 0) & (read > 0)
            s = torch.where(alive, (written / read.clamp(min=1e-30)).sqrt(), 1.0)
            pair.scale(s)
            most = max(most, float(s.amax()), 1 / float(s.amin()))
        if most < SETTLED:
            break
    found.error = float((logits(module, x) - before).norm() / scale)
    return found


def _pairs(module: nn.Module, graph: ChannelGraph) -> list[_Pair]:
    """Each layer with the next one that reads all of its channels, in order of execution."""
    weights = [use for use in graph.uses if use.name.endswith(".weight") and use.role in ("writes", "reads")]
    found = []
    for number, writes in enumerate(weights):
        labels = writes.labels.tolist()
        units = sorted(set(labels))
        if writes.role != "writes" or {FREE, FROZEN} & set(labels):
            continue
        for use in weights[number + 1 :]:
            read = _read(module, use)
            if read is None or set(read) != set(labels):
                continue
            writer, reader = (u.name.removesuffix(".weight") for u in (writes, use))
            layers = module.get_submodule(writer), module.get_submodule(reader)
            found.append(
                _Pair(
                    writer,
                    reader,
                    layers[0],
                    layers[1],
                    len(units),
                    *(torch.tensor([units.index(label) for label in side]) for side in (labels, read)),
                )
            )
            break
    return found


def _read(module: nn.Module, use: Use) -> list[int] | None:
    """The labels of a layer's inputs; None where the use is of its outputs alone."""
    labels = use.labels.tolist()
    if use.role == "reads":
        return labels
    layer = module.get_submodule(use.name.removesuffix(".weight"))
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
        return labels[:: layer.out_channels // layer.groups]
    return None


def _by_input(layer: nn.Module) -> Tensor:
    """A view of a layer's weight, (groups, outputs, inputs, window) of each group."""
    weight = layer.get_parameter("weight").data
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)
