"""Dividing a tensor at its source: the scale goes into the norm that wrote it, and costs nothing at run time.

A fold is accepted only if it is seen to change nothing: the norm is divided by random powers of two, the matrices'
inputs are multiplied by them, and the block's output must stay as it was. A residual branch, a router or anything
else that reads the norm's output too makes the output differ, and the fold is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormFold:
    """A norm whose output can be divided by a scale per feature.

    Attributes:
        norm: the module.
        offset: 1 where the norm multiplies by ``1 + weight`` (Gemma, Nemotron), else 0.
    """

    norm: nn.Module
    offset: int

    def snap(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale nearest to ``s`` (in,) for which the divided norm weight is a number of ``dtype``.

        Rounding the norm's weight would otherwise change each feature by up to one unit in the last place, and
        nothing would make up for it in the matrices.
        """
        gain = self._gain()
        stored = (gain / s - self.offset).to(dtype).float() + self.offset
        usable = (gain != 0) & (stored != 0) & torch.isfinite(stored) & ((gain / stored) > 0)
        return torch.where(usable, gain / torch.where(usable, stored, 1.0), s)

    def divide(self, s: Tensor, dtype: torch.dtype) -> None:
        """weight ← weight / s, bias ← bias / s, rounded to the ``dtype`` they are stored in."""
        self._write("weight", (self._gain() / s - self.offset).to(dtype))
        if isinstance(getattr(self.norm, "bias", None), Tensor):
            self._write("bias", (self.norm.get_parameter("bias").float() / s).to(dtype))

    def _gain(self) -> Tensor:
        return self.norm.get_parameter("weight").float() + self.offset

    def _write(self, attribute: str, value: Tensor) -> None:
        self.norm.get_parameter(attribute).data.copy_(value)


def find_fold(
    norm: nn.Module, x: Tensor, readers: list[nn.Module], run_block: Callable[[], Tensor], reference: Tensor
) -> tuple[NormFold | None, str]:
    """A verified fold, or None and the reason for refusing it.

    Args:
        norm: module that wrote the readers' input.
        x: what the norm read.
        readers: the matrices.
        run_block: runs the block on fixed inputs.
        reference: the block's output as it is.
    """
    offset = _offset(norm, x)
    if offset is None:
        return None, f"{type(norm).__name__} is neither x·w nor x·(1 + w)"
    fold = NormFold(norm, offset)
    width = norm.get_parameter("weight").shape[0]
    generator = torch.Generator().manual_seed(width)
    s = torch.pow(2.0, torch.randint(-2, 3, (width,), generator=generator)).to(x.device)
    with _restored(norm), _scaled_inputs(readers, s):
        fold.divide(s, torch.float32)
        scaled = run_block()
    error = float((scaled.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-30))
    if error <= _tolerance(reference.dtype):
        return fold, ""
    return None, f"something else reads the output of its {type(norm).__name__} (block output changed by {error:.1e})"


def _tolerance(dtype: torch.dtype) -> float:
    """Powers of two are exact; only 1 + w rounds, to the dtype's precision. A wrong fold is off by 1e-1 and more."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _offset(norm: nn.Module, x: Tensor) -> int | None:
    """0 or 1: what the norm adds to its weight. Zeroed, it reveals it."""
    with _restored(norm):
        normal = norm(x)
        norm.get_parameter("weight").data.zero_()
        zeroed = norm(x)
        if isinstance(getattr(norm, "bias", None), Tensor):
            zeroed = zeroed - norm.get_parameter("bias")
        if not bool(zeroed.any()):
            return 0
        norm.get_parameter("weight").data.fill_(-1)
        reversed_out = norm(x)
        if isinstance(getattr(norm, "bias", None), Tensor):
            reversed_out = reversed_out - norm.get_parameter("bias")
    return 1 if normal.shape == zeroed.shape and not bool(reversed_out.any()) else None


@contextmanager
def _restored(norm: nn.Module) -> Iterator[None]:
    """Puts the norm's parameters back afterwards."""
    before = {name: p.detach().clone() for name, p in norm.named_parameters()}
    try:
        yield
    finally:
        for name, value in before.items():
            norm.get_parameter(name).data.copy_(value)


@contextmanager
def _scaled_inputs(readers: list[nn.Module], s: Tensor) -> Iterator[None]:
    """Multiplies what the matrices read by ``s``: the same as scaling their columns, without touching them."""

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * s.to(args[0].dtype), *args[1:])

    hooks = [reader.register_forward_pre_hook(scale) for reader in readers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
