"""Input groups, discovered: which matrices of a block read one and the same tensor, and which norm wrote it.

A few tokens are run through the block with every tensor kept alive, so that equal storage means equal tensor. No
architecture is named anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.model.experts import visiting_all_experts
from llmcompress.model.fold import NormFold, find_fold
from llmcompress.model.load import Block
from llmcompress.model.matrix import MatrixView, is_matrix

Call = tuple[tuple[Any, ...], dict[str, Any]]
#: where a tensor begins, how many elements it has, and its last axis
Storage = tuple[int, int, int]


@dataclass
class InputGroup:
    """Matrices reading one tensor.

    Attributes:
        matrices: in the order in which the block calls them; the first is where a forward is suspended.
        width: columns of the rows that the matrices multiply.
        fold: how to divide the tensor at its source; None if that is impossible.
        fold_name: dotted name of the norm it goes into.
        fold_refusal: why; empty if there is a fold.
    """

    matrices: list[MatrixView]
    width: int
    fold: NormFold | None = None
    fold_name: str = ""
    fold_refusal: str = "no norm writes its input"

    @property
    def name(self) -> str:
        """The first matrix's name."""
        return self.matrices[0].label

    def parts(self) -> list[InputGroup]:
        """The group itself, or one per group of its convolutions, each with rows of its own."""
        split = zip(*(m.parts() for m in self.matrices), strict=True)
        return [replace(self, matrices=list(matrices)) for matrices in split]


@dataclass
class BlockMap:
    """What a probe found in one block.

    Attributes:
        groups: in calling order.
        unreached: matrices the block does not call.
        uncalled: names of those whose weight it reads nevertheless.
        parameters: number of all parameters of the block.
    """

    groups: list[InputGroup]
    unreached: list[MatrixView] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    parameters: int = 0


@torch.no_grad()
def map_block(block: Block, call: Call, folds: bool = True) -> BlockMap:
    """Finds the input groups of a block and verifies which of them can be smoothed.

    Args:
        block: with its weights loaded.
        call: arguments with which the model calls it, for a few tokens.
        folds: False if nothing smooths: then no fold is looked for, which takes a forward for each norm.

    Returns:
        Groups in calling order; `fold` is set only where scaling by powers of two left the block's output unchanged.
    """
    record = _Record()
    with record.watch(block.module), visiting_all_experts(block.module):
        reference = run_block(block.module, call)
    groups: dict[tuple[Storage, tuple[object, ...]], InputGroup] = {}
    for module, x in record.matrix_inputs:
        view = MatrixView(f"{block.name}.{_name_of(block.module, module)}", module)
        groups.setdefault((_storage(x), view.geometry), InputGroup([], view.shape[1])).matrices.append(view)
    found = list(groups.values())
    for (key, geometry), group in groups.items():
        norm = record.writers.get(key)
        if not folds:
            group.fold_refusal = "no step smooths"
        elif geometry:
            group.fold_refusal = "a convolution reads it, patch by patch"
        elif norm is not None:
            group.fold, group.fold_refusal = find_fold(
                norm, record.writer_inputs[key], [m.module for m in group.matrices],
                lambda: run_block(block.module, call), reference,
            )  # fmt: skip
            group.fold_name = f"{block.name}.{_name_of(block.module, norm)}" if group.fold else ""
    reached = {m.name for g in found for m in g.matrices}
    views = [MatrixView(f"{block.name}.{n}", m) for n, m in block.module.named_modules() if is_matrix(m)]
    unreached = [view for view in views if view.name not in reached]
    uncalled = [view.name for view in unreached if _reads_weight(block.module, call, view)]
    unreached = [view for view in unreached if view.name not in uncalled]
    return BlockMap(found, unreached, uncalled, sum(p.numel() for p in block.module.parameters()))


def _reads_weight(block: nn.Module, call: Call, view: MatrixView) -> bool:
    """Whether a matrix that is not called matters all the same: NaN in its weight then reaches the block's output."""
    parameter = view.module.get_parameter("weight")
    before = parameter.detach().clone()
    parameter.data.fill_(math.nan)
    output = run_block(block, call)
    parameter.data.copy_(before)
    return bool(output.isnan().any())


class _Record:
    """First inputs of matrices and outputs of norms, kept alive so that no storage is used twice."""

    def __init__(self) -> None:
        self.matrix_inputs: list[tuple[nn.Module, Tensor]] = []
        self.writers: dict[Storage, nn.Module] = {}
        self.writer_inputs: dict[Storage, Tensor] = {}
        self._alive: list[Tensor] = []

    @contextmanager
    def watch(self, block: nn.Module) -> Iterator[None]:
        """Hooks lent to the block for one forward."""
        hooks = []
        for module in block.modules():
            if is_matrix(module):
                hooks.append(module.register_forward_pre_hook(self._on_matrix))
            elif _is_norm(module):
                hooks.append(module.register_forward_hook(self._on_norm))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_matrix(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if all(module is not seen for seen, _ in self.matrix_inputs):
            self.matrix_inputs.append((module, args[0]))

    def _on_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.writers[_storage(output)] = module
            self.writer_inputs[_storage(output)] = args[0]
            self._alive.append(output)


def _is_norm(module: nn.Module) -> bool:
    """A leaf with one weight per feature: LayerNorm, RMSNorm and their relatives."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not list(module.children())


def _storage(x: Tensor) -> Storage:
    """Identity of the memory a tensor shows: equal for views of the whole, different for slices."""
    return x.data_ptr(), x.numel(), x.shape[-1]


def run_block(module: nn.Module, call: Call) -> Tensor:
    """The block's hidden-state output; tensors among the arguments are copied, as blocks may write into them."""
    args, kwargs = call
    output = type(module).forward(module, *(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise UserError(
            f"a block returns {type(first).__name__}", type(module).__name__, "such models are not supported"
        )
    return first


def _name_of(block: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in block.named_modules() if candidate is module)
