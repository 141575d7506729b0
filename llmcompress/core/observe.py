"""Range estimators: which of several trial ranges of a grid loses least when weights are rounded to it, and which range
of an input a static grid should cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmcompress.core.grid import QuantGrid

#: shares of the full range that an ``mse`` grid tries
SHARES = tuple(1 - step / 100 for step in range(80))
#: groups whose trials are held at once
FIT_GROUPS = 1 << 14
#: of a histogram of inputs
BINS = 2048
#: share of the values that ``percentile`` covers
COVERED = 0.9999


def best_trial(
    values: Tensor, scale: Tensor, zero: Tensor, codes: tuple[int, int], weight: Tensor | None = None
) -> Tensor:
    """The trial of least Σ weight · |error|^2.4 for each group of values (GPTQ's search); of equals the first.

    Args:
        values: (groups, size) float32.
        scale, zero: (trials, groups) float32.
        codes: lowest and highest.
        weight: (groups, size) of the errors; ones if None, which is compiled on a CPU.

    Returns:
        (groups,) int64.
    """
    if weight is None and values.device.type == "cpu":
        from llmcompress.core.kernels import mse_range  # here: a model that only runs wants no compiler

        return mse_range.best_trial(values.contiguous(), scale, zero, codes)
    best = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    least = torch.full((len(values),), torch.inf, device=values.device)
    for trial in range(len(scale)):
        size, offset = scale[trial, :, None], zero[trial, :, None]
        rounded = torch.clamp(torch.round(values / size + offset), *codes)
        error = ((rounded - offset) * size - values).abs_().pow_(2.4)
        loss = (error if weight is None else error * weight).sum(-1)
        best = torch.where(loss < least, trial, best)
        least = torch.minimum(loss, least)
    return best


def least_error(
    grid: QuantGrid, grouped: Tensor, low: Tensor, high: Tensor, scale_dtype: torch.dtype, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best of `SHARES` of each group's range, for some groups at a time, so that the trials stay small.

    Args:
        grid: of integers.
        grouped: (rows or 1, G, size) float32.
        low, high: (rows or 1, G) its range.
        scale_dtype: that scales are stored in.
        weight: of the errors, like ``grouped``; ones if None.

    Returns:
        Scales and zero points, (rows or 1, G); None for those of a symmetric grid.
    """
    size, found = grouped.shape[-1], []
    parts = [t.split(FIT_GROUPS) for t in (grouped.reshape(-1, size), low.flatten(), high.flatten())]
    weights = [None] * len(parts[0]) if weight is None else weight.reshape(-1, size).split(FIT_GROUPS)
    for x, least, most, w in zip(*parts, weights, strict=True):
        trials = [grid.levels(least * share, most * share, scale_dtype) for share in SHARES]
        scale = torch.stack([t.scale for t in trials])
        zero = torch.stack([torch.zeros_like(t.scale) if t.zero_point is None else t.zero_point for t in trials])
        best = best_trial(x, scale, zero, grid.range, w)[None]
        found.append((scale.gather(0, best)[0], zero.gather(0, best)[0]))
    scale, zero = (torch.cat(pieces).view_as(low) for pieces in zip(*found, strict=True))
    return scale, None if grid.symmetric else zero


def observed_range(grid: QuantGrid, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The range of a static grid, by its observer, on a histogram of 2,048 bins.

    ``percentile`` covers 99.99 % of the values. The others try `SHARES` of the full range, on the values that are not
    zero, as every grid has zero itself and ReLU leaves a spike of it in one bin: ``mse`` takes the share of the least
    squared error; ``kl`` that of the least divergence between the histogram and what is left of it in codes (Migacz,
    2017); ``entropy`` that of the largest weighted entropy of the codes, − Σ I P log P, P a code's share of the values
    and I the mean of their squares (Park et al., 2017).

    Args:
        grid: of a whole tensor.
        rows: (tokens, in) float32 each.

    Returns:
        (1, 1) lowest, at most 0, and highest, at least 0.
    """
    low = torch.stack([x.amin() for x in rows]).amin().clamp(max=0).cpu()
    high = torch.stack([x.amax() for x in rows]).amax().clamp(min=0).cpu()
    if float(low) != float(high):
        seen = rows if grid.observer == "percentile" else [x[x != 0] for x in rows]
        counts = torch.stack([torch.histc(x, BINS, float(low), float(high)) for x in seen]).double().sum(0).cpu()
        low, high = _covered(grid, low, high, counts)
    return low.view(1, 1).to(rows[0].device), high.view(1, 1).to(rows[0].device)


def _covered(grid: QuantGrid, low: Tensor, high: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The part of [low, high] that is worth covering."""
    width = float(high - low) / BINS
    centres = float(low) + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    if grid.observer == "percentile":
        below = counts.cumsum(0) / counts.sum()
        tail = (1 - COVERED) / 2
        bottom, top = int((below < tail).sum()), int((below < 1 - tail).sum())
        return (low + width * bottom).clamp(max=0), (low + width * (top + 1)).clamp(min=0)
    losses = [_loss(grid, centres, counts, low * share, high * share) for share in SHARES]
    best = SHARES[losses.index(min(losses))]
    return low * best, high * best


def _loss(grid: QuantGrid, centres: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> float:
    """Of one trial range."""
    levels = grid.levels(low.view(1, 1), high.view(1, 1))
    codes = grid.quantize(centres.float()[None], levels)
    if grid.observer == "mse":
        return float(((grid.dequantize(codes, levels)[0].double() - centres).square() * counts).sum())
    number = codes[0].long() - int(codes.min())
    mass = counts / counts.sum()
    held = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add_(0, number, mass)
    if grid.observer == "entropy":
        energy = torch.zeros_like(held).index_add_(0, number, mass * centres.square())
        return float((energy * held.clamp(min=1e-300).log()).sum())  # I P is the energy's share
    inside = (centres >= low) & (centres <= high)
    seen = inside & (counts > 0)
    reference = torch.where(inside, mass, 0.0)
    edges = inside.nonzero().flatten()
    reference[edges[0]] += mass[: edges[0]].sum()
    reference[edges[-1]] += mass[edges[-1] + 1 :].sum()
    kept = torch.zeros_like(held).index_add_(0, number[seen], mass[seen])
    bins = torch.zeros_like(held).index_add_(0, number[seen], torch.ones_like(mass[seen]))
    spread = torch.where(seen, (kept / bins.clamp(min=1))[number], 0.0)
    spread = (spread / spread.sum()).clamp(min=1e-12)
    return float(torch.special.xlogy(reference, reference / spread).sum())
