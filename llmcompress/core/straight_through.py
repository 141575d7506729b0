"""Rounding that can be learned through: the values of `QuantGrid.round`, with the gradient of rounding taken to be one
(Bengio et al., 2013, arXiv:1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcompress.core.grid import Levels, QuantGrid


class _Round(torch.autograd.Function):
    """To the nearest integer; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def round_through(grid: QuantGrid, x: Tensor, levels: Levels) -> Tensor:
    """``x`` (rows, cols) on the grid, float32. Gradients reach ``x`` where it is not clipped, and the ``levels``."""
    parts = (1, 1, -1) if grid.group == "tensor" else (x.shape[0], -1, grid.group_size(x.shape[1]))
    scale = levels.scale[..., None]
    zero = 0.0 if levels.zero_point is None else levels.zero_point[..., None]
    codes = torch.clamp(_Round.apply(x.float().reshape(parts) / scale + zero), *grid.range)
    return ((codes - zero) * scale).view_as(x)
