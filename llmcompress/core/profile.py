"""How large the inputs of a group get, channel by channel, in a few hundred bytes, for the report.

    peak_j = max_t |X_tj|,  outlier ratio = max_j peak_j / median_j peak_j

A profile is the largest peak of each of at most 256 runs of neighbouring channels, each as one byte, 8 · log₂ rounded,
with 0 at 128: nine per cent fine, from 2⁻¹⁶ to 2¹⁶. The bytes are in base64, so that a profile is one string."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: runs of channels in a profile
BINS = 256
#: tokens that are looked at, evenly spread
TOKENS = 2048
_STEPS, _ONE = 8, 128
_PEAKS = [2.0 ** ((level - _ONE) / _STEPS) for level in range(256)]


def channel_peaks(rows: Sequence[Tensor]) -> Tensor:
    """(in,) float32, the largest |x| per channel over at most about `TOKENS` of the tokens.

    Args:
        rows: (tokens, in) each, at least one.
    """
    stride = max(1, sum(len(x) for x in rows) // TOKENS)
    seen = [x[::stride] for x in rows if len(x)]
    if not seen:
        return torch.zeros(rows[0].shape[1], device=rows[0].device)
    return torch.stack([torch.maximum(x.amax(0), -x.amin(0)) for x in seen]).amax(0).float()


def outlier_ratio(peaks: Tensor) -> float:
    """The largest peak over the median one; 1 where no channel stands out, and where the median is 0."""
    median = float(peaks.median())
    return float(peaks.max()) / median if median > 0 else 1.0


def encoded(peaks: Tensor) -> str:
    """The profile of ``peaks`` (in,) as base64."""
    bins = min(BINS, len(peaks))
    where = torch.arange(len(peaks), device=peaks.device) * bins // len(peaks)
    runs = torch.zeros(bins, device=peaks.device).scatter_reduce_(0, where, peaks.float(), "amax")
    levels = (runs.clamp(min=2.0**-16).log2() * _STEPS + _ONE).round().clamp(0, 255)
    return base64.b64encode(bytes(levels.to(torch.uint8).tolist())).decode("ascii")


def decoded(profile: str) -> list[float]:
    """The peaks that a profile holds, one per run of channels.

    Raises:
        ValueError: not base64.
    """
    return [_PEAKS[level] for level in base64.b64decode(profile, validate=True)]


def described(peaks: Tensor, smoothing: Tensor | None) -> dict[str, Any]:
    """For the report: the number of channels, their profile before smoothing by ``smoothing`` (in,) and after it, where
    there was one, and the outlier ratios of both."""
    seen = {"before": peaks} if smoothing is None else {"before": peaks, "after": peaks / smoothing.abs()}
    ratios = {when: outlier_ratio(values) for when, values in seen.items()}
    return {"channels": len(peaks), "outlier_ratio": ratios} | {when: encoded(v) for when, v in seen.items()}
