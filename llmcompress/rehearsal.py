"""A block run on what waits in front of it, with matrices that are only being tried: what `core.block.BlockView` asks
for. The block itself stays as it is, and the forwards go on waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.core.block import BlockGroup, Transform
from llmcompress.export.quantized import unsupported
from llmcompress.model.groups import Call, InputGroup, run_block
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.matrix import MatrixView
from llmcompress.suspend import SuspendedForward


def spans(model: BlockwiseModel, targets: Callable[[str], bool]) -> list[tuple[float, float]]:
    """Per block the shares of all blocks' targeted weights that lie before it, and up to its end."""
    sizes = [
        sum(
            p.numel()
            for name, p in block.module.named_parameters()
            if p.dim() > 1 and targets(f"{block.name}.{name.removesuffix('.weight')}")
        )
        for block in model.blocks
    ]
    ends = [0, *accumulate(sizes)]
    return [(first / max(ends[-1], 1), last / max(ends[-1], 1)) for first, last in pairwise(ends)]


class Rehearsal:
    """Tries of one block, whose weights are loaded.

    Args:
        index, name: of the block.
        span: where it lies among all blocks' weights, as in `BlockView`.
        module: the block.
        groups: its input groups, in calling order; convolutions with several groups stay out.
        targets: whether the matrix of this name is to be compressed.
        forwards: they wait in front of the block.
        dense: the dense model's block and forwards in step with these; the same ones if there is no other lane.
        scale_dtype: dtype in which quantization scales will be stored.
        note: shows how far the work is.
    """

    def __init__(
        self,
        index: int,
        name: str,
        span: tuple[float, float],
        module: nn.Module,
        groups: list[InputGroup],
        targets: Callable[[str], bool],
        forwards: list[SuspendedForward],
        dense: tuple[nn.Module, list[SuspendedForward]],
        scale_dtype: torch.dtype,
        note: Callable[[str], None],
    ) -> None:
        self.index, self.span, self.batches, self.scale_dtype = index, span, len(forwards), scale_dtype
        self._name, self._block, self._forwards, self._dense = name, _Ungated(module), forwards, dense
        self._found, self._targets, self._note = groups, targets, note
        self._views: dict[str, MatrixView] = {}
        self._readers: dict[str, list[nn.Module]] = {}

    @cached_property
    def groups(self) -> list[BlockGroup]:
        """In calling order; their weights are copied when they are first asked for."""
        return [self._described(group) for group in self._found if self._chosen(group)]

    def run(
        self, batch: int, weights: Mapping[str, Tensor] | None = None, inputs: Mapping[str, Transform] | None = None
    ) -> Tensor:
        replaced = {}
        for name, weight in (weights or {}).items():
            view = self._views[name]
            parameter = f"block.{view.name.removeprefix(self._name + '.')}.weight"
            replaced[parameter] = view.as_stored(weight).to(view.module.get_parameter("weight").dtype)
        with self._transformed(inputs or {}):
            return functional_call(self._block, replaced, (self._forwards[batch].call,))

    @torch.no_grad()
    def aim(self, batch: int) -> Tensor:
        block, forwards = self._dense
        return run_block(block, forwards[batch].call).float()

    def note(self, text: str) -> None:
        self._note(text)

    def _chosen(self, group: InputGroup) -> dict[str, MatrixView]:
        return {m.label: m for m in group.matrices if m.groups == 1 and self._targets(m.name)}

    def _described(self, group: InputGroup) -> BlockGroup:
        chosen = self._chosen(group)
        name = next(iter(chosen))
        self._views |= chosen
        self._readers[name] = [view.module for view in chosen.values()]
        return BlockGroup(
            name,
            {label: view.read() for label, view in chosen.items()},
            [view.read() for view in group.matrices if view.groups == 1 and view.label not in chosen],
            folds=group.fold is not None,
            rounds_inputs=not any(unsupported(type(m.module)) for m in group.matrices),
        )

    @contextmanager
    def _transformed(self, inputs: Mapping[str, Transform]) -> Iterator[None]:
        """Hooks lent to the matrices of the groups that ``inputs`` names, for one forward."""
        hooks = []
        for name, transform in inputs.items():
            transformed = _once_per_tensor(transform)
            hooks += [reader.register_forward_pre_hook(transformed) for reader in self._readers[name]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Ungated(nn.Module):
    """A block's own forward, past the gate that its callers wait at."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, call: Call) -> Tensor:
        return run_block(self.block, call).float()


def _once_per_tensor(transform: Transform) -> Callable[..., tuple[Any, ...]]:
    """A pre-hook that transforms a tensor once, however many matrices read it."""
    last: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not last or last[0] is not args[0]:
            last[:] = [args[0], transform(args[0])]
        return (last[1], *args[1:])

    return hook
