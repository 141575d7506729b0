"""Rounding that can be learned through: the values of `QuantGrid.round`, with the gradient of rounding taken to be one
(Bengio et al., 2013, arXiv:1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcompress.core.grid import Levels, QuantGrid

#: more than any weight or activation, and less than what float32 cannot divide by a scale
_BEYOND = 1e25


class _Round(torch.autograd.Function):
    """To the nearest integer; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def round_through(grid: QuantGrid, x: Tensor, levels: Levels) -> Tensor:
    """``x`` (rows, cols), of a grid per tensor any shape, on the grid, float32. Gradients reach ``x`` where it is not
    clipped, and the ``levels`` of an integer grid."""
    if grid.kind != "int":
        return _through_table(grid, x, levels)
    parts = (1, 1, -1) if grid.group == "tensor" else (x.shape[0], -1, grid.group_size(x.shape[1]))
    scale = levels.scale[..., None]
    zero = 0.0 if levels.zero_point is None else levels.zero_point[..., None]
    codes = torch.clamp(_Round.apply(x.float().reshape(parts) / scale + zero), *grid.range)
    return ((codes - zero) * scale).view_as(x)


def _through_table(grid: QuantGrid, x: Tensor, levels: Levels) -> Tensor:
    """Of levels that are no integers."""
    rows = x.detach().float().reshape(x.shape[0], -1)
    low, high = (grid.round(torch.full_like(rows, end), levels) for end in (-_BEYOND, _BEYOND))
    inside = ((rows >= low) & (rows <= high)).view_as(x)
    return grid.round(rows, levels).view_as(x) + (x - x.detach()) * inside
