"""Figures of one matrix as a loader sees it.

The outlier ratio of a row (an output) is its largest magnitude over its root mean square; the matrix has that of its
worst row, and the same over columns (inputs). A constant has 1, random normal numbers about 4, and what is far above is
hard to round: one value decides the scale of all that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixFigures:
    """One matrix.

    Attributes:
        name: of the module.
        block: decoder block; empty outside them.
        shape: (out, in).
        bytes: on disk, with scales and all.
        bits: on disk per weight.
        format: dtype on disk, or the container of its codes.
        sparsity: share of weights that are exactly zero.
        zeros: number of them.
        row_outlier, column_outlier: largest max |w| / rms of a row and of a column.
    """

    name: str
    block: str
    shape: tuple[int, int]
    bytes: int
    bits: float
    format: str
    sparsity: float
    zeros: int
    row_outlier: float
    column_outlier: float

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]


def outlier_ratio(values: Tensor, axis: int) -> float:
    """Largest max |w| / rms over the slices of ``values`` (out, in) along ``axis``; 0 if all of them are zero."""
    peak = values.abs().amax(axis)
    rms = (values.norm(dim=axis) / values.shape[axis] ** 0.5).clamp(min=torch.finfo(torch.float32).tiny)
    return float((peak / rms).amax())
