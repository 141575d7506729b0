"""What values the columns of a sweep may take: a mask's zeros, a quantization grid's levels, or both in turn."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.core.grid import Levels, QuantGrid
from llmcompress.core.kernels import select_cpu
from llmcompress.core.sparsity import Sparsity

#: columns over which an unstructured mask is decided at once
BLOCK = 128


class ColumnTarget(Protocol):
    """What values a column may take. Several, in order, are composed: mask, then round what stays.

    Attributes:
        group: consecutive columns decided together; 0 if all was decided before the sweep.
    """

    group: int

    def begin(self, adjusted: Tensor, j: int) -> None:
        """Decides columns j to j + group from their weights adjusted for the errors so far, (out, ≤ group)."""

    def project(self, column: Tensor, j: int) -> Tensor:
        """The allowed values nearest to ``column`` (out,), the j-th."""


class Mask:
    """Zeroes the least salient weights, or those of a mask already decided.

    Args:
        sparsity: how many.
        diagonal: (in,) V_kk of the factor.
        rows: number of output rows.

    Attributes:
        keep: (out, in) bool; a column is decided once the sweep has reached it.
    """

    def __init__(self, sparsity: Sparsity, diagonal: Tensor, rows: int) -> None:
        self.sparsity, self.diagonal = sparsity, diagonal
        self.group = sparsity.m or BLOCK
        self.keep = torch.ones(len(self.diagonal), rows, dtype=torch.bool, device=diagonal.device).T

    @staticmethod
    def held(keep: Tensor) -> Mask:
        """A mask decided before, (out, in) bool."""
        mask = Mask.__new__(Mask)
        mask.sparsity, mask.group, mask.keep = Sparsity(0.0), 0, keep.T.contiguous().T
        return mask

    @property
    def compares_rows(self) -> bool:
        """Whether what one row loses hangs on the others."""
        return bool(self.group) and not self.sparsity.m

    def part(self, rows: slice) -> Mask:
        """The mask of some rows, of which `take` takes the decisions back."""
        twin = copy.copy(self)
        twin.keep = self.keep.T[:, rows].contiguous().T
        return twin

    def take(self, rows: slice, part: Mask) -> None:
        """Decisions of a `part`."""
        self.keep[rows] = part.keep

    def begin(self, adjusted: Tensor, j: int) -> None:
        """Drops the lowest w² V_kk²: N:M within each row, a ratio over all rows of the block, with exact totals."""
        columns = slice(j, j + adjusted.shape[1])
        score = (adjusted * self.diagonal[columns]).square_()
        if self.sparsity.m:
            self.keep[:, columns] = self.sparsity.keep_mask(score)
            return
        rows = len(adjusted)
        drop = self.sparsity.zeros_of(rows * (j + adjusted.shape[1])) - self.sparsity.zeros_of(rows * j)
        self.keep.T[columns] = _keep_highest(score.T, drop)

    def project(self, column: Tensor, j: int) -> Tensor:
        return torch.where(self.keep[:, j], column, 0)


class Round:
    """Rounds to a quantization grid, fitted group by group to the adjusted weights, or ahead of the sweep.

    Args:
        grid: where each group of columns shares a scale per row (or per tensor).
        weight: (out, in) what levels fixed ahead are fitted to.
        scale_dtype: dtype scales will be stored in.
        mask: what it drops does not widen the range, where that is known at the group's start (N:M is not).
        level_of: (in,) index of the group each column belongs to, for columns that are not in their original order;
            all levels are then fixed ahead, from ``weight`` in its original order.
        static: fix levels ahead in any case.
        generator: of a grid that rounds at random.
    """

    def __init__(
        self,
        grid: QuantGrid,
        weight: Tensor,
        scale_dtype: torch.dtype,
        mask: Mask | None = None,
        level_of: Tensor | None = None,
        static: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        rows, columns = weight.shape
        size = grid.group_size(columns)
        ahead = static or level_of is not None or size == columns
        self.grid, self.scale_dtype, self.mask, self.generator = grid, scale_dtype, mask, generator
        self.group = 0 if ahead else size
        self.level_of = torch.arange(columns, device=weight.device) // size if level_of is None else level_of
        self.scale = torch.ones(columns // size, rows, device=weight.device)
        self.zero = torch.zeros_like(self.scale)
        if ahead:
            self._set(grid.fit(weight, scale_dtype), 0)

    def part(self, rows: slice, mask: Mask | None) -> Round:
        """The rounding of some rows under their part of the mask, of which `take` takes the levels back."""
        twin = copy.copy(self)
        twin.scale, twin.zero = self.scale[:, rows].contiguous(), self.zero[:, rows].contiguous()
        twin.mask = None if self.mask is None else mask
        return twin

    def take(self, rows: slice, part: Round) -> None:
        """Levels of a `part`."""
        self.scale[:, rows], self.zero[:, rows] = part.scale, part.zero

    def _set(self, levels: Levels, group: int) -> None:
        last = group + levels.scale.shape[1]
        self.scale[group:last] = levels.scale.T
        if levels.zero_point is not None:
            self.zero[group:last] = levels.zero_point.T

    @property
    def levels(self) -> Levels:
        """Scales and zero points of all groups, (out or 1, groups)."""
        rows = slice(0, 1 if self.grid.group == "tensor" else None)
        return Levels(self.scale.T[rows].contiguous(), None if self.grid.symmetric else self.zero.T[rows].contiguous())

    def begin(self, adjusted: Tensor, j: int) -> None:
        if self.mask is not None and not self.mask.sparsity.m:
            adjusted = adjusted * self.mask.keep[:, j : j + self.group]
        self._set(self.grid.fit(adjusted, self.scale_dtype), j // self.group)

    def project(self, column: Tensor, j: int) -> Tensor:
        group = int(self.level_of[j])
        levels = Levels(self.scale[group, :, None], self.zero[group, :, None])
        return replace(self.grid, group="channel").round(column[:, None], levels, self.generator)[:, 0]


def _keep_highest(score: Tensor, drop: int) -> Tensor:
    """False for exactly the ``drop`` lowest of all non-negative scores."""
    if score.device.type == "cpu" and score.dtype == torch.float32:
        return select_cpu.keep_highest(score.contiguous(), drop)
    keep = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    keep[torch.topk(score.flatten(), drop, largest=False, sorted=False).indices] = False
    return keep.view_as(score)
