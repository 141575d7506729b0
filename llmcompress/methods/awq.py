"""AWQ (Lin et al., 2023, arXiv:2306.00978): scale up the columns of active inputs before the weights are rounded.

    s_j = mean|X_j|^α / rms(W_:j)^β, normalised by sqrt(max s · min s),  α the best of 20 points in [0, 1)

by the output error of all matrices that read the input, tr(E H Eᵀ) with E = round(W s) / s − W. Departures: the error
is exact over all calibration rows, from their Gram matrix, where the paper samples rows; once α is found with β = 0,
which is the paper's scale, the best of five β may even out the columns of the weights; the division by s is folded into
the producing norm as SmoothQuant's is. Optionally each group's range is then clipped to the best of twenty shares
of it, by the same error: where the paper looks at the group's own columns alone, here each group makes up for what the
others lose. A smooth stage: the grid is that of the quantize stage after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError

FLOOR = 1e-4
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: shares of a group's range that a clip search tries, from all of it to about half
CLIP_STEPS = 20
#: times that every group is visited
CLIP_ROUNDS = 2
#: elements of the temporaries of a clip search
CLIP_CHUNK = 1 << 16


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

    def __post_init__(self) -> None:
        if self.points < 1:
            raise UserError(f"{self.points} points", "smooth.points", "use 1 or more")

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
        active = mean_abs.clamp(min=FLOOR)
        size = torch.stack([m.weight.square().mean(0) for m in group]).mean(0).sqrt().clamp(min=FLOOR)
        errors: dict[tuple[float, float], float] = {}

        def scale(alpha: float, beta: float) -> Tensor:
            s = active.pow(alpha) / size.pow(beta)
            return s / (s.max() * s.min()).sqrt()

        def error(alpha: float, beta: float) -> float:
            if (alpha, beta) not in errors:
                s = scale(alpha, beta)
                errors[alpha, beta] = sum(rounding_error(m.weight, s, H, grid, m.scale_dtype) for m in group)
            return errors[alpha, beta]

        alpha = min((i / self.points for i in range(self.points)), key=lambda alpha: error(alpha, 0.0))
        beta = min(BETAS, key=lambda beta: error(alpha, beta))
        group.figures |= {"awq_alpha": alpha, "awq_beta": beta}
        return scale(alpha, beta)


def rounding_error(W: Tensor, s: Tensor, H: Tensor, grid: QuantGrid, scale_dtype: torch.dtype) -> float:
    """tr(E H Eᵀ) of a matrix (out, in) rounded to nearest with its columns scaled by ``s`` (in,)."""
    scaled = W * s
    E = grid.round(scaled, grid.fit(scaled, scale_dtype)) / s - W
    return float(((E @ H) * E).sum())


def clipped(W: Tensor, H: Tensor, grid: QuantGrid, scale_dtype: torch.dtype) -> Tensor:
    """``W`` (out, in) with each group clamped to the share of its range, 100 % down to 52.5 %, that rounds best.

    Groups are taken in turn, each by the row's error tr(E H Eᵀ) given the errors E of the others; the second round
    knows them all.
    """
    size, chosen, E = grid.group_size(W.shape[1]), W.clone(), torch.zeros_like(W)
    starts, span = range(0, W.shape[1], size), max(1, CLIP_CHUNK // size)
    for _ in range(CLIP_ROUNDS if len(starts) > 1 else 1):
        for first in starts:
            columns = slice(first, first + size)
            within = H[columns, columns]
            beside = E @ H[:, columns] - E[:, columns] @ within
            for row in range(0, len(W), span):
                rows = slice(row, row + span)
                chosen[rows, columns], E[rows, columns] = _clip_rows(
                    W[rows, columns], within, beside[rows], grid, scale_dtype
                )
    return chosen


def _clip_rows(
    w: Tensor, H: Tensor, beside: Tensor, grid: QuantGrid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One group of columns, (rows, size), clamped to its best share, and the errors of rounding it then.

    Args:
        H: (size, size) of the group's columns.
        beside: (rows, size) errors of the row's other groups times H.
    """
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best, best_errors, least = torch.ones_like(high), torch.zeros_like(w), torch.full_like(high, torch.inf)
    linear = 2 * beside
    for step in range(CLIP_STEPS):
        share = 1 - step / (2 * CLIP_STEPS)
        bottom, top = low * share, high * share
        levels = grid.levels(bottom.clamp(max=0), top.clamp(min=0), scale_dtype)  # as they will be fitted
        E = grid.round(w.clamp(bottom, top), levels).sub_(w)
        loss = torch.addmm(linear, E, H).mul_(E).sum(1, keepdim=True)
        better = loss < least
        best[better], least = share, torch.minimum(loss, least)
        best_errors = torch.where(better, E, best_errors)
    return w.clamp(low * best, high * best), best_errors
