"""Scales and zero points of integer grids as tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.core.grid import Levels, QuantGrid


def pack_levels(role: str, grid: QuantGrid, levels: Levels, dtype: torch.dtype) -> dict[str, Tensor]:
    """``weight_scale`` and, if asymmetric only, ``weight_zero_point``: (out, groups), or (1,) per tensor.

    Args:
        role: ``weight`` or ``input``.
        grid: integer, of the levels.
        levels: to store.
        dtype: of the scales.

    Raises:
        ValueError: a scale is not exact in ``dtype``, or zero points and symmetry disagree.
    """
    shape = (1,) if grid.group == "tensor" else levels.scale.shape
    scale = levels.scale.to(dtype)
    if not torch.equal(scale.float(), levels.scale.float()):
        raise ValueError(f"{role} scales are not exact in {dtype}: fit the grid with scale_dtype={dtype}")
    tensors = {f"{role}_scale": scale.reshape(shape)}
    if grid.symmetric != (levels.zero_point is None):
        raise ValueError(f"{role} zero points belong to asymmetric grids, and only to them")
    if levels.zero_point is not None:
        tensors[f"{role}_zero_point"] = levels.zero_point.to(torch.int8).reshape(shape)
    return tensors


def unpack_levels(role: str, tensors: Mapping[str, Tensor]) -> Levels:
    """The inverse: float32, (out or 1, groups)."""
    scale, zero = tensors[f"{role}_scale"].float(), tensors.get(f"{role}_zero_point")
    if scale.dim() < 2:  # per tensor
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    return Levels(scale, None if zero is None else zero.float())
