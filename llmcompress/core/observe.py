"""Range estimators: which of several trial ranges of a grid loses least when weights are rounded to it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.core.kernels import mse_range


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
