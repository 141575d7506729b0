"""Which channels of a network leave together, from its exported graph.

Every entry of every tensor of the graph bears a label. Convolutions and Linears give their outputs new ones; whatever
moves entries (views, permutations, concatenation) moves their labels; whatever combines tensors entry by entry unites
them; whatever mixes channels in another way, splits them by a number that stands in the code, or is not known here
freezes them. A class of labels is a unit: rows of the weights that write it, columns of those that read it, entries of
everything between."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from llmcompress.errors import UserError
from llmcompress.vision.labels import FREE, FROZEN, Labels, along, varying
from llmcompress.vision.operators import CUTS, MOVES, POOLS, REDUCTIONS, SAME, is_pointwise


@dataclass
class Use:
    """An axis of a parameter or buffer along which channels lie.

    Attributes:
        name: dotted.
        axis: of the tensor as it is stored.
        labels: (n,).
        role: ``writes``, ``reads`` or ``scales``.
    """

    name: str
    axis: int
    labels: Tensor
    role: str


@dataclass
class ChannelGraph:
    """What can be removed from a network.

    Attributes:
        uses: with the roots of their labels.
        groups: weights of convolutions with several groups → outputs of one group.
    """

    uses: list[Use]
    groups: dict[str, int] = field(default_factory=dict)

    def removable(self) -> set[int]:
        """Units that something writes, and that are not frozen."""
        written = {int(label) for use in self.uses if use.role == "writes" for label in use.labels}
        return written - {FREE, FROZEN}


def channel_graph(module: nn.Module, x: Tensor) -> ChannelGraph:
    """Traces a network.

    Args:
        module: in evaluation mode.
        x: (N, C, H, W), at least two images, as torch.export takes one image for a fixed number.

    Raises:
        UserError: it cannot be traced.
    """
    try:
        exported = torch.export.export(module, (x,))
    except Exception as error:  # an exporter may fail in any way
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"torch.export cannot trace it: {said}", type(module).__name__, "leave channels out") from None
    tracer = _Tracer(exported)
    return tracer.run()


class _Tracer:
    def __init__(self, exported: Any) -> None:
        self.labels, self.uses, self.groups = Labels(), dict[tuple[str, int], Use](), dict[str, int]()
        signature = exported.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = set(signature.inputs_to_lifted_tensor_constants)
        self.graph: fx.Graph = exported.graph_module.graph
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> ChannelGraph:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if node.name not in self.names:
                    self.values[node] = self._all(node, FROZEN)
            elif node.op == "output":
                for value in self._inputs(node):
                    self.labels.freeze(value)
            elif node.target is operator.getitem:
                held = self.values.get(node.args[0])
                self.values[node] = held[node.args[1]] if isinstance(held, list | tuple) else held
            elif isinstance(node.meta.get("val"), Tensor | list | tuple):
                self.values[node] = self._call(node)
        uses = [Use(u.name, u.axis, self.labels.roots(u.labels), u.role) for u in self.uses.values()]
        return ChannelGraph(uses, self.groups)

    def _call(self, node: fx.Node) -> Any:
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
        handler: dict[str, Callable[[fx.Node], Any]] = {
            "conv2d": self._conv, "convolution": self._conv, "linear": self._linear, "batch_norm": self._norm,
            "_native_batch_norm_legit_no_training": self._norm, "prelu": self._norm, "pad": self._pad,
            "constant_pad_nd": self._pad,
        }  # fmt: skip
        name = name[:-1] if name.endswith("_") else name
        if name in handler:
            return handler[name](node)
        if name in MOVES:
            return self._move(node, name)
        if name in CUTS:
            return self._cut(node, name)
        if name in POOLS:
            return self._pool(node)
        if name in REDUCTIONS:
            return self._reduce(node)
        if name in SAME or is_pointwise(node, name):
            return self._combine(node)
        return self._freeze(node)

    # what a node reads

    def _value(self, argument: Any) -> Any:
        """Labels of an argument: of a parameter that is used as it is, its own."""
        if isinstance(argument, list | tuple):
            return [self._value(part) for part in argument]
        if not isinstance(argument, fx.Node):
            return argument
        if argument.name in self.names and argument not in self.values:
            self.values[argument] = self._own(argument)
        return self.values.get(argument, argument.meta.get("val"))

    def _own(self, node: fx.Node) -> Tensor:
        """A parameter read entry by entry: along its one axis of more than one entry it may lose some."""
        shape = node.meta["val"].shape
        wide = [a for a, n in enumerate(shape) if n > 1]
        if len(wide) != 1:
            return self._all(node, FROZEN if wide else FREE)
        name = self.names[node.name]
        labels = self._use(name, wide[0], self.labels.fresh(shape[wide[0]]), "scales")
        return labels.view([-1 if a == wide[0] else 1 for a in range(len(shape))])

    def _inputs(self, node: fx.Node) -> list[Tensor]:
        found = [self._value(argument) for argument in node.all_input_nodes]
        flat = [part for value in found for part in (value if isinstance(value, list | tuple) else [value])]
        return [v for v in flat if isinstance(v, Tensor) and v.dtype == torch.int64]

    def _use(self, name: str, axis: int, labels: Tensor, role: str) -> Tensor:
        """Notes a use; one that was noted before goes together with this one."""
        found = self.uses.setdefault((name, axis), Use(name, axis, labels, role))
        self.labels.unite(found.labels, labels)
        return found.labels

    def _parameter(self, argument: Any) -> str | None:
        return self.names.get(argument.name) if isinstance(argument, fx.Node) else None

    # what becomes of labels

    def _all(self, node: fx.Node, label: int) -> Any:
        value = node.meta["val"]
        made = [torch.tensor(label).expand(v.shape) for v in (value if isinstance(value, list | tuple) else [value])]
        return made if isinstance(value, list | tuple) else made[0]

    def _freeze(self, node: fx.Node) -> Any:
        for value in self._inputs(node):
            self.labels.freeze(value)
        return self._all(node, FROZEN)

    def _conv(self, node: fx.Node) -> Any:
        arguments = list(node.args) + [None] * (7 - len(node.args))
        weight = self._parameter(arguments[1])
        shape = arguments[1].meta["val"].shape  # type: ignore[union-attr]
        read = along(self._value(arguments[0]), -3)
        if weight is None or len(shape) != 4 or read is None or (len(node.args) > 7 and node.args[6]):
            return self._freeze(node)
        groups = len(read) // shape[1]
        written = self.labels.fresh(shape[0])
        if groups == 1:
            self._use(weight, 1, read, "reads")
        else:
            self._together(read, groups)
            self._together(written, groups)
            self.labels.unite(read[:: shape[1]], written[:: shape[0] // groups])
            self.groups[weight] = shape[0] // groups
        written = self._written(weight, arguments[2], written)
        return written.view(-1, 1, 1).expand(node.meta["val"].shape)

    def _together(self, labels: Tensor, groups: int) -> None:
        """Channels of one group go together."""
        parts = labels.view(groups, -1)
        self.labels.unite(parts, parts[:, :1].expand_as(parts).contiguous())

    def _linear(self, node: fx.Node) -> Any:
        weight, bias = self._parameter(node.args[1]), node.args[2] if len(node.args) > 2 else None
        read = along(self._value(node.args[0]), -1)
        if weight is None or read is None:
            return self._freeze(node)
        self._use(weight, 1, read, "reads")
        rows = node.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
        return self._written(weight, bias, self.labels.fresh(rows)).expand(node.meta["val"].shape)

    def _written(self, weight: str, bias: Any, labels: Tensor) -> Tensor:
        labels = self._use(weight, 0, labels, "writes")
        name = self._parameter(bias)
        if name is not None:
            self._use(name, 0, labels, "scales")
        return labels

    def _norm(self, node: fx.Node) -> Any:
        value = self._value(node.args[0])
        channels = along(value, 1)
        if channels is None:
            return self._freeze(node)
        for argument in node.args[1:5]:
            name = self._parameter(argument)
            one = isinstance(argument, fx.Node) and argument.meta["val"].numel() < len(channels)  # of PReLU, for all
            if name is not None and not one:
                self._use(name, 0, channels, "scales")
        result = node.meta["val"]
        return [value] * len(result) if isinstance(result, list | tuple) else value

    def _move(self, node: fx.Node, name: str) -> Any:
        before = self._inputs(node)
        moved = node.target(*map(self._value, node.args), **node.kwargs)  # type: ignore[operator]
        parts = moved if isinstance(moved, list | tuple) else [moved]
        if any(len(varying(part)) > 1 for part in parts):
            return self._freeze(node)  # an axis was split: its parts would have to stay alike
        if name in ("chunk", "unbind") and any(varying(part) != varying(before[0]) for part in parts):
            return self._freeze(node)
        if name == "chunk" and varying(before[0]) == [int(node.args[2] if len(node.args) > 2 else 0) % before[0].dim()]:  # type: ignore[arg-type]
            if len({part.shape for part in parts}) > 1:
                return self._freeze(node)
            for part in parts[1:]:  # halves stay halves
                self.labels.unite(parts[0], part)
        return moved

    def _cut(self, node: fx.Node, name: str) -> Any:
        value = self._value(node.args[0])
        axis = int(node.args[2] if name.startswith("split") and len(node.args) > 2 else 0)  # type: ignore[arg-type]
        if not name.startswith("split"):
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        result = node.meta["val"]
        whole = isinstance(result, Tensor) and result.shape == value.shape
        if not whole and axis % value.dim() in varying(value):
            return self._freeze(node)
        return node.target(*map(self._value, node.args), **node.kwargs)  # type: ignore[operator]

    def _pool(self, node: fx.Node) -> Any:
        value, result = self._value(node.args[0]), node.meta["val"]
        channels = along(value, -3)
        if channels is None:
            return self._freeze(node)
        shape = (result[0] if isinstance(result, list | tuple) else result).shape
        pooled = channels.view(-1, 1, 1).expand(shape)
        return [pooled] * len(result) if isinstance(result, list | tuple) else pooled

    def _pad(self, node: fx.Node) -> Any:
        value, sides = self._value(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        padded = [value.dim() - 1 - n // 2 for n, size in enumerate(sides) if size != 0]
        if set(padded) & set(varying(value)):
            return self._freeze(node)
        for a in padded:
            value = value.narrow(a, 0, 1)
        return value.expand(node.meta["val"].shape)

    def _reduce(self, node: fx.Node) -> Any:
        value = self._value(node.args[0])
        axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = list(range(value.dim())) if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
        axes = [a % value.dim() for a in axes]  # type: ignore[operator, union-attr]
        if set(axes) & set(varying(value)):
            return self._freeze(node)
        for a in axes:
            value = value.narrow(a, 0, 1)
        return value.reshape(node.meta["val"].shape)

    def _combine(self, node: fx.Node) -> Any:
        values = [v for v in self._inputs(node) if v.dim()]
        if not values:
            return self._all(node, FREE)
        shape = node.meta["val"].shape
        found: Tensor | None = None
        full = [v.expand(shape) if math.prod(v.shape) <= math.prod(shape) else v for v in values]
        axes = {a for v in full for a in varying(v)}
        for value, wide in zip(values, full, strict=True):
            lead = len(shape) - value.dim()
            if any(a < lead or value.shape[a - lead] != shape[a] for a in axes) and bool((value != FREE).any()):
                self.labels.freeze(value)  # one entry meets several channels: it stays, and they are as free as before
                continue
            if found is None:
                found = wide
            else:
                self.labels.unite(found, wide)
                found = torch.where(found == FREE, wide, found)
        return self._all(node, FROZEN) if found is None else found
