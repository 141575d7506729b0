"""One view of every layer that multiplies by a matrix: weights as (out, in), whatever the module stores, and the rows
that they meet. A convolution is a matrix over unfolded patches; one with several groups is as many matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def is_matrix(module: nn.Module) -> bool:
    """Whether `MatrixView` can read the module."""
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d)


@dataclass(frozen=True)
class MatrixView:
    """A module's weight as (out, in).

    Attributes:
        name: dotted name of the module in the model.
        module: ``nn.Linear``; GPT-2's ``Conv1D``, which stores (in, out); or ``nn.Conv2d``, whose inputs are the
            in_channels / groups · kh · kw entries of a patch.
        part: which group of a convolution this is; None for the whole module, which is one matrix only if it has one
            group (see `parts`).
    """

    name: str
    module: nn.Module
    part: int | None = None

    @property
    def label(self) -> str:
        """The name, with the part if it is one."""
        return self.name if self.part is None else f"{self.name}[{self.part}]"

    @property
    def transposed(self) -> bool:
        """Whether the module stores (in, out)."""
        return isinstance(self.module, Conv1D)

    @property
    def geometry(self) -> tuple[object, ...]:
        """What decides how a tensor becomes rows: readers of one tensor share them if they share this."""
        module = self.module
        if not isinstance(module, nn.Conv2d):
            return ()
        window = (module.kernel_size, module.stride, module.dilation, module.padding, module.padding_mode)
        return (*window, module.groups)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); of a convolution with several groups that is not split, all outputs by one group's inputs."""
        rows, *columns = self.module.get_parameter("weight").shape
        if self.transposed:
            return columns[0], rows
        return (rows if self.part is None else rows // self.groups), math.prod(columns)

    @property
    def groups(self) -> int:
        """Matrices in the module: 1 but for a convolution with several groups."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    def parts(self) -> list[MatrixView]:
        """One view per matrix: the groups of a convolution, or the view itself."""
        if self.groups == 1 or self.part is not None:
            return [self]
        return [replace(self, part=part) for part in range(self.groups)]

    def rows(self, x: Tensor) -> Tensor:
        """The rows that the matrix multiplies.

        Args:
            x: the module's input, (..., in), or (N, C, H, W) or (C, H, W) of a convolution.

        Returns:
            (tokens, in); a convolution's tokens are its output positions, image by image.
        """
        if not isinstance(self.module, nn.Conv2d):
            return x.reshape(-1, x.shape[-1])
        if self.part is not None:
            x = x.unflatten(-3, (self.groups, -1)).select(-4, self.part)
        return _patches(x if x.dim() == 4 else x[None], self.module)

    @property
    def weight(self) -> Tensor:
        """The module's own values seen as (out, in), in its dtype."""
        weight = self._own(self.module.get_parameter("weight"))
        return weight.T if self.transposed else weight.flatten(1)

    def read(self) -> Tensor:
        """A float32 copy, (out, in)."""
        return self.weight.to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Replaces the values by ``weight`` (out, in), in the module's dtype."""
        self.store(weight, self.module.get_parameter("weight"))

    def store(self, weight: Tensor, stored: Tensor) -> None:
        """Copies ``weight`` (out, in) into ``stored``, laid out as the module's whole weight."""
        own = self._own(stored)
        own.copy_(weight.T if self.transposed else weight.reshape(own.shape))

    def as_stored(self, weight: Tensor) -> Tensor:
        """``weight`` (out, in) in the layout of the module's weight, or of this part of it."""
        own = self._own(self.module.get_parameter("weight"))
        return weight.T.contiguous() if self.transposed else weight.reshape(own.shape)

    def _own(self, stored: Tensor) -> Tensor:
        """This matrix's share of a tensor laid out as the module's weight: the first axis belongs to the groups."""
        if self.part is None and self.groups > 1:
            raise ValueError(f"{self.name} is {self.groups} matrices: take its parts()")
        stored = stored.detach()
        return stored if self.part is None else stored.chunk(self.groups)[self.part]


def _patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(N · positions, channels · kh · kw) windows of ``x`` (N, C, H, W) that the convolution sees."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    window = cast(tuple[int, int], conv.kernel_size)
    padded = F.pad(x, _padding(conv), mode=mode)
    columns = F.unfold(padded, window, dilation=conv.dilation, stride=conv.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def _padding(conv: nn.Conv2d) -> list[int]:
    """Left, right, top, bottom, whether the module has numbers or the words ``same`` and ``valid``."""
    if not isinstance(conv.padding, str):
        vertical, horizontal = conv.padding
        return [horizontal, horizontal, vertical, vertical]
    if conv.padding == "valid":
        return [0] * 4
    sides: list[int] = []
    for step, size in zip(reversed(conv.dilation), reversed(conv.kernel_size), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides
