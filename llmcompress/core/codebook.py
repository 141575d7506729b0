"""Grids whose levels are no even steps: an ascending table c with a zero in it, times a scale s.

| kind       | levels of b bits                          | s                        | w / s goes to          |
|------------|-------------------------------------------|--------------------------|------------------------|
| `power`    | 0, ±2^-k, k < 2^(b-1) - 1                 | 2^round(log2 absmax)     | sign · 2^round(log2 ·) |
| `log`      | 0, ±2^(-k/2), k < 2^(b-1) - 1             | least squares, or absmax | the nearest            |
| `codebook` | given, or 2^b - 1 that suit normal values | least squares, or absmax | the nearest            |

`power` is that of shifts instead of products (Zhou et al., 2017, arXiv:1702.03044), `log` that of base √2 (Miyashita et
al., 2016, arXiv:1603.01025). Levels for normal weights are those of least squared error in the limit of many
(Panter & Dite, 1951): as dense as the cube root of the density, which is a normal one of variance 3.

Least squares is min ‖w − s·c(assignment)‖² over the scale and the assignment together, and exact: see `best_scale`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.floats import all_codes, float_codes, float_values

#: of this file
KINDS = ("power", "log", "codebook")
#: breakpoints that are sorted at once
_BREAKPOINTS = 1 << 22


@dataclass(frozen=True)
class Table:
    """The levels of a grid before they are scaled.

    Attributes:
        values: (K,) float32, ascending, with a zero.
        middles: (K - 1,) float32: what is larger than the k-th goes to value k + 1 or higher.
    """

    values: Tensor
    middles: Tensor

    def index(self, exact: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Where ``exact`` goes, int64; with ``uniform`` in [0, 1) up or down as likely as it is near."""
        if uniform is None:
            return torch.bucketize(exact, self.middles.to(exact.device))
        values = self.values.to(exact.device)
        below = (torch.bucketize(exact, values, right=True) - 1).clamp(0, len(values) - 2)
        low, high = values[below], values[below + 1]
        return below + (uniform < (exact - low) / (high - low)).long()

    @property
    def middle(self) -> int:
        """The index that code 0 stands for."""
        return len(self.values) // 2

    def read(self, codes: Tensor) -> Tensor:
        """float32 values of codes, which are indices less `middle`."""
        return self.values.to(codes.device)[codes.long() + self.middle]

    @property
    def zero(self) -> int:
        """The index of the zero."""
        return int((self.values == 0).nonzero())


def codebook(kind: str, bits: int, values: tuple[float, ...] = ()) -> Table:
    """The levels of a kind of `KINDS`, the largest of those not given being 1."""
    if values:
        return _nearest(torch.tensor(values, dtype=torch.float64))
    count = (1 << (bits - 1)) - 1
    if kind == "codebook":
        places = (torch.arange(1, count + 1, dtype=torch.float64) + count + 0.5) / (2 * count + 1)
        magnitudes = torch.special.ndtri(places)
        magnitudes = magnitudes / magnitudes[-1]
    else:
        magnitudes = (
            torch.arange(count - 1, -1, -1, dtype=torch.float64).mul_(-1.0 if kind == "power" else -0.5).exp2_()
        )
    if kind != "power":
        return _nearest(torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes]))
    up = (magnitudes * 2**-0.5).float()  # where round(log2 ·) changes
    values_of = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes]).float()
    return Table(values_of, torch.cat([-up.flip(0), up]))


def float_table(kind: str) -> Table:
    """The levels of a kind of `llmcompress.core.floats.FLOATS`; halves go to the even code, as there."""
    values = float_values(kind, all_codes(kind))
    values = values[~values.isnan()].unique()
    middles = (values[1:] + values[:-1]) / 2  # exact
    to_upper = float_codes(kind, values[1:]).int() % 2 == 0
    lower = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
    return Table(values, torch.where(to_upper, lower, middles))


def range_scale(kind: str, table: Table, low: Tensor, high: Tensor) -> Tensor:
    """The least scale at which no value of [low, high], low ≤ 0 ≤ high, is beyond the table; for `power` as above."""
    if kind == "power":
        most = torch.maximum(-low, high)
        return torch.where(most == 0, 1.0, torch.exp2(torch.round(torch.log2(most))))
    bottom, top = float(table.values[0]), float(table.values[-1])
    scale = torch.zeros_like(high)
    for reach, end in ((low, bottom), (high, top)):
        if end != 0:
            scale = torch.maximum(scale, reach / end)
    return scale


def best_scale(x: Tensor, table: Table, weight: Tensor | None = None) -> Tensor:
    """The scale s of least Σ h (w − s·c)² for each group, c being the table's value nearest to w / s.

    As 1 / s grows from nothing, entries pass from zero through the middles of the table, one at a time. Between two
    such passages the assignment is fixed and its best scale is A / B with A = Σ h w c and B = Σ h c², at which the
    loss is Σ h w² − A² / B; the assignment of the optimum is one of them, so the largest A² / B is the optimum.

    Args:
        x: (groups, size) float32.
        weight: (groups, size) h; ones if None.

    Returns:
        (groups,) float32; 0 for groups of zeros.
    """
    zero, values = table.zero, table.values.double().to(x.device)
    sides = [(values[zero:], 1.0), (values[: zero + 1].flip(0), -1.0)]
    most = max(len(side) for side, _ in sides) - 1
    breaks = torch.full((2, most), torch.inf, dtype=torch.float64, device=x.device)
    first, second = torch.zeros_like(breaks), torch.zeros_like(breaks)
    for row, (side, sign) in enumerate(sides):
        n = len(side) - 1
        breaks[row, :n] = sign * (side[1:] + side[:-1]) / 2
        first[row, :n], second[row, :n] = side.diff(), side.square().diff()
    step = max(_BREAKPOINTS // max(x.shape[1] * most, 1), 1)
    weights = [None] * -(-len(x) // step) if weight is None else weight.split(step)
    parts = zip(x.split(step), weights, strict=True)
    return torch.cat([_best_scale(part.double(), h, breaks, first, second) for part, h in parts]).float()


def _best_scale(w: Tensor, h: Tensor | None, breaks: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of some groups, in float64."""
    side = (w < 0).long()  # (groups, size)
    at = (breaks[side] / w.abs()[..., None]).flatten(1)
    more = (first[side] * w[..., None], second[side])
    if h is not None:
        more = (more[0] * h[..., None], more[1] * h[..., None])
    order = at.argsort(dim=1, stable=True)
    reached = at.gather(1, order).isfinite()
    a, b = (torch.where(reached, part.flatten(1).gather(1, order), 0.0).cumsum(1) for part in more)
    gain = torch.where(b > 0, a.square() / b.clamp(min=torch.finfo(b.dtype).tiny), 0.0)
    best = gain.argmax(1, keepdim=True)
    a, b = a.gather(1, best)[:, 0], b.gather(1, best)[:, 0]
    return torch.where(b > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), 0.0)


def _nearest(values: Tensor) -> Table:
    """Ascending float64 values with thresholds half way."""
    return Table(values.float(), ((values[1:] + values[:-1]) / 2).float())
