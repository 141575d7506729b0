"""AWQ (Lin et al., 2023, arXiv:2306.00978): scale up the columns of active inputs before the weights are rounded.

    s_j = mean|X_j|^α, normalised by sqrt(max s · min s),  α the best of 20 points in [0, 1)

by the output error of all matrices that read the input, tr(E H Eᵀ) with E = round(W s) / s − W. Departures: the error
is exact over all calibration rows, from their Gram matrix, where the paper samples rows; the division by s is folded
into the producing norm as SmoothQuant's is. Optionally each group's range is then clipped to the best of ten shares
of it, by the same error within the group's columns. A smooth stage: the grid is that of the quantize stage after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError

FLOOR = 1e-4
#: elements of the temporaries of a clip search
CLIP_CHUNK = 1 << 22


@dataclass(frozen=True)
class AWQ(Method):
    """Scales inputs by their activity to protect the weights they meet.

    Attributes:
        points: how many α are tried.
        clip: search for the clipping of each group, too.
    """

    points: int = 20
    clip: bool = False

    stage = "smooth"
    needs = frozenset({"mean_abs", "gram"})

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        grid = next((getattr(m, "weights", None) for m in rest if m.stage == "quantize"), None)
        if not isinstance(grid, QuantGrid):
            raise UserError("awq scales for a quantize stage, and none follows", "smooth", "add a quantize stage")
        if self.clip and grid.group == "tensor":
            raise UserError("one scale per tensor cannot follow clipped rows", "smooth.clip", "set clip: false")
        H = stats.gram
        if not group.fold_refusal:  # the report names the reason
            group.smooth(self._search(group, stats.mean_abs, H, grid), stats)
        if self.clip:
            H = stats.gram
            for matrix in group:
                matrix.weight = clipped(matrix.weight, H, grid, matrix.scale_dtype)
        return stats

    def _search(self, group: MatrixGroup, mean_abs: Tensor, H: Tensor, grid: QuantGrid) -> Tensor:
        """(in,) the best scale; all ones if none is better."""
        best, best_error = torch.ones_like(mean_abs), torch.inf
        for i in range(self.points):
            s = mean_abs.clamp(min=FLOOR).pow(i / self.points)
            s = s / (s.max() * s.min()).sqrt()
            error = sum(rounding_error(m.weight, s, H, grid, m.scale_dtype) for m in group)
            if error < best_error:
                best, best_error = s, error
                group.figures["awq_alpha"] = i / self.points
        return best


def rounding_error(W: Tensor, s: Tensor, H: Tensor, grid: QuantGrid, scale_dtype: torch.dtype) -> float:
    """tr(E H Eᵀ) of a matrix (out, in) rounded to nearest with its columns scaled by ``s`` (in,)."""
    scaled = W * s
    E = grid.round(scaled, grid.fit(scaled, scale_dtype)) / s - W
    return float(((E @ H) * E).sum())


def clipped(W: Tensor, H: Tensor, grid: QuantGrid, scale_dtype: torch.dtype) -> Tensor:
    """``W`` (out, in) with each group clamped to the share of its range, 100 % down to 55 %, that rounds best."""
    size = grid.group_size(W.shape[1])
    pieces: list[Tensor] = []
    for columns in W.split(size, dim=1):
        first = len(pieces) * size
        H_group = H[first : first + size, first : first + size]
        rows = max(1, CLIP_CHUNK // size)
        pieces.append(torch.cat([_clip_rows(w, H_group, grid, scale_dtype) for w in columns.split(rows)]))
    return torch.cat(pieces, dim=1)


def _clip_rows(w: Tensor, H: Tensor, grid: QuantGrid, scale_dtype: torch.dtype) -> Tensor:
    """One group of columns, (rows, size)."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best, best_error = w, torch.full_like(high, torch.inf)
    for step in range(10):
        share = 1 - step / 20
        clamped = w.clamp(low * share, high * share)
        E = grid.round(clamped, grid.fit(clamped, scale_dtype)) - w
        error = ((E @ H) * E).sum(1, keepdim=True)
        best = torch.where(error < best_error, clamped, best)
        best_error = torch.minimum(error, best_error)
    return best
