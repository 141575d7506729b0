"""Experts as ordinary matrices. transformers keeps the experts of a layer as stacked tensors and multiplies them all at
once; here each expert gets Linears of its own and is run on the rows that the router sends to it, so that whatever
compresses a Linear compresses an expert.

What a stack looks like is asked of the module that holds it. `quirks` knows the few that do not say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from llmcompress.model.quirks import UNDECLARED


@dataclass(frozen=True)
class Stack:
    """One parameter that holds a matrix, or several side by side, of every expert.

    Attributes:
        parameter: its name within the module, e.g. ``gate_up_proj``.
        linears: names of the matrices within an expert, in the order of their outputs; one empty name if the expert
            itself is the matrix.
        bias: name of the parameter with their biases (experts, outputs); empty if there are none.
        transposed: an expert's part is (in, out).
        interleaved: outputs of the matrices take turns.
        flat: the experts' parts follow one another along the first axis of a tensor of two axes.
    """

    parameter: str
    linears: tuple[str, ...]
    bias: str = ""
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False

    def share(self, stacked: Tensor, expert: int, experts: int, number: int) -> Tensor:
        """The view of one matrix (out, in) of one expert, or of its bias (out,), in the stacked tensor."""
        own = stacked.chunk(experts)[expert] if self.flat else stacked[expert]
        return self.matrix(own, number)

    def matrix(self, own: Tensor, number: int) -> Tensor:
        """The same in the part that belongs to the expert."""
        own = own.T if self.transposed and own.dim() == 2 else own
        if self.interleaved:
            return own[number :: len(self.linears)]
        return own.chunk(len(self.linears))[number]


@dataclass(frozen=True)
class Cut:
    """Where a parameter of an expert lies in a stacked tensor.

    Attributes:
        stack: how it is laid out.
        expert, experts: which one of how many.
        number: of the matrix within the stack.
    """

    stack: Stack
    expert: int
    experts: int
    number: int

    def view(self, stacked: Tensor) -> Tensor:
        """The parameter as a view of the whole stacked tensor."""
        return self.stack.share(stacked, self.expert, self.experts, self.number)

    def fits(self, stacked: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a stacked tensor of one shape holds parameters of the other."""
        return tuple(self.view(torch.empty(stacked, device="meta")).shape) == shape

    def read(self, rows: Callable[[int, int], Tensor], length: int) -> Tensor:
        """The parameter, of which no more is read than the expert's part.

        Args:
            rows: reads the stacked tensor from a first row to the one before a last.
            length: rows of the stacked tensor.
        """
        each = length // self.experts
        own = rows(self.expert * each, (self.expert + 1) * each)
        return self.stack.matrix(own if self.stack.flat else own[0], self.number).contiguous()


@dataclass(frozen=True)
class ExpertLayer:
    """A module with stacked experts.

    Attributes:
        name: dotted name in the model.
        module: as transformers made it.
        experts: how many.
        stacks: its stacked parameters.
    """

    name: str
    module: nn.Module
    experts: int
    stacks: tuple[Stack, ...]

    @property
    def separable(self) -> bool:
        """Whether transformers reads a tensor for each expert from a quantized checkpoint, though dense ones stack
        them."""
        patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(self.module).__name__, {})
        return QuantizationMethod.COMPRESSED_TENSORS in patch.get("quantization_methods", ())

    def own_names(self) -> Iterator[str]:
        """Dotted names of the parameters of all experts once they are matrices of their own."""
        for expert in range(self.experts):
            for stack in self.stacks:
                for number in range(len(stack.linears)):
                    yield from (self.own_name(stack, expert, number, bias) for bias in {False, bool(stack.bias)})

    def parameters(self) -> Iterator[tuple[str, Stack, bool]]:
        """Dotted names of the stacked parameters, what they are, and whether they are biases."""
        for stack in self.stacks:
            yield f"{self.name}.{stack.parameter}", stack, False
            if stack.bias:
                yield f"{self.name}.{stack.bias}", stack, True

    def own_name(self, stack: Stack, expert: int, number: int, bias: bool = False) -> str:
        """The name that a parameter of one expert gets once it is a matrix of its own."""
        parts = (self.name, str(expert), stack.linears[number], "bias" if bias else "weight")
        return ".".join(filter(None, parts))


class StackedLinear(nn.Linear):
    """A matrix of an expert that its checkpoint keeps in a stacked tensor, for which quantized formats have no room."""

    stacked = True


def find_experts(model: nn.Module) -> list[ExpertLayer]:
    """Every module with stacked experts, on any device."""
    found = []
    for name, module in model.named_modules():
        stacks = _stacks(module)
        if stacks:
            found.append(ExpertLayer(name, module, _count(module, stacks[0]), stacks))
    return found


def find_routers(model: nn.Module, layers: list[ExpertLayer]) -> set[str]:
    """Names of the matrices that decide between experts: beside them, with one output per expert, or a single one.

    Call it before the experts are unstacked.
    """
    found = set()
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_modules(prefix=parent):
            if isinstance(module, nn.Linear) and module.out_features in (1, layer.experts):
                found.add(name)
    return found


def unstack(layer: ExpertLayer, stacked_on_disk: bool) -> None:
    """Gives each expert Linears of its own, on the meta device, and the module a forward that runs them one by one.

    Args:
        layer: the skeleton's.
        stacked_on_disk: the checkpoint keeps the experts in stacked tensors too.
    """
    kind = StackedLinear if stacked_on_disk and not layer.separable else nn.Linear
    for expert in range(layer.experts):
        parts: dict[str, nn.Module] = {}
        for stack in layer.stacks:
            for number, name in enumerate(stack.linears):
                weight = stack.share(layer.module.get_parameter(stack.parameter), expert, layer.experts, number)
                parts[name] = kind(
                    weight.shape[1], weight.shape[0], bias=bool(stack.bias), device="meta", dtype=weight.dtype
                )
        layer.module.add_module(str(expert), parts[""] if "" in parts else nn.ModuleDict(parts))
    forward = _forward_of(layer)
    for name, _, _ in layer.parameters():
        owner, _, attribute = name.rpartition(".")
        holder = layer.module.get_submodule(owner.removeprefix(layer.name).removeprefix("."))
        delattr(holder, attribute)
    layer.module.visits_all = False  # type: ignore[assignment]
    layer.module.forward = MethodType(forward, layer.module)  # type: ignore[method-assign, assignment]


@contextmanager
def visiting_all_experts(block: nn.Module) -> Iterator[None]:
    """While open, every expert of the block is called, those without a token on a row whose result is dropped."""
    modules = [module for module in block.modules() if hasattr(module, "visits_all")]
    for module in modules:
        module.visits_all = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.visits_all = False  # type: ignore[assignment]


def _stacks(module: nn.Module) -> tuple[Stack, ...]:
    if hasattr(module, "visits_all"):
        return ()
    for described in UNDECLARED:
        if described.fits(module):
            return tuple(Stack(*fields) for fields in described.stacks)
    down = module._parameters.get("down_proj")
    if down is None or down.dim() != 3 or not hasattr(module, "is_transposed"):
        return ()
    bias = "_bias" if module.has_bias else ""
    first, linears = ("gate_up_proj", ("gate_proj", "up_proj")) if module.has_gate else ("up_proj", ("up_proj",))
    turns = bool(module.has_gate and not module.is_concatenated)
    return (
        Stack(first, linears, bias and first + bias, bool(module.is_transposed), turns),
        Stack("down_proj", ("down_proj",), bias and "down_proj" + bias, bool(module.is_transposed)),
    )


def _count(module: nn.Module, stack: Stack) -> int:
    if stack.flat:
        return int(module.num_experts)  # type: ignore[arg-type]
    return module.get_parameter(stack.parameter).shape[0]


def _forward_of(layer: ExpertLayer) -> Callable[..., Tensor]:
    """How the module runs its experts, asked before its parameters are gone."""
    for described in UNDECLARED:
        if described.fits(layer.module):
            return described.forward
    names = list(inspect.signature(type(layer.module).forward).parameters)[1:4]

    def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden, index, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
        return _routed(self, layer.experts, hidden, index, weights)

    return forward


def _routed(module: nn.Module, experts: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Σ over a token's experts of weight · expert(token).

    Args:
        hidden: (tokens, in).
        index: (tokens, k) of the chosen experts.
        weights: (tokens, k) of theirs.
    """
    output = torch.zeros_like(hidden)
    for number in range(experts):
        expert = module.get_submodule(str(number))
        token, place = (index == number).nonzero(as_tuple=True)
        if len(token):
            result = _run(module, expert, hidden[token]) * weights[token, place, None]
            output.index_add_(0, token, result.to(output.dtype))
        elif module.visits_all:
            _run(module, expert, hidden[:1].clone())
    return output


def _run(module: nn.Module, expert: nn.Module, x: Tensor) -> Tensor:
    """One expert on its rows (tokens, in)."""
    if module.has_gate:
        gate, up = expert["gate_proj"](x), expert["up_proj"](x)  # type: ignore[index]
        both = torch.cat([gate, up], -1) if module.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        x = module._apply_gate(both)  # type: ignore[operator]
    else:
        x = module.act_fn(expert["up_proj"](x))  # type: ignore[index, operator]
    x = expert["down_proj"](x)  # type: ignore[index]
    return module.post_expert_norm(x) if module.has_post_expert_norm else x  # type: ignore[operator]
