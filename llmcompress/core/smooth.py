"""Migration scales: how much of an input's range moves into the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-5


def migration_scale(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """SmoothQuant's s_j = max|X_j|^α / max|W_:j|^(1−α) (Xiao et al., 2022, eq. 4).

    Args:
        absmax: (in,) largest |x| per input.
        weights: (out, in) each, every matrix that reads the input.
        alpha: migration strength in [0, 1].

    Returns:
        (in,) positive and finite; both maxima are floored at 1e-5. Inputs that are never active keep scale 1.
    """
    weight_max = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=FLOOR)
    s = absmax.clamp(min=FLOOR).pow(alpha) / weight_max.pow(1 - alpha)
    return torch.where(absmax > 0, s.clamp(min=FLOOR), 1.0)
