"""The range search of an ``mse`` grid on the CPU, compiled by numba: which of many trial levels rounds a group of
weights with the least Σ|error|^2.4.

Groups are independent, and run in plain threads. A trial is passed over without a look at the group where its extreme
values alone would lose more than the best trial so far: their clipping errors are part of every sum. The plain
torch version in `llmcompress.core.observe` is the reference."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share

#: sums may be reordered, so that they become vector instructions; nothing divides by a reciprocal
FAST = {"contract", "nsz", "nnan", "reassoc"}
#: terms that are added up in float32
CHUNK = 1024
#: bits(y^(−1/5)) ≈ this − bits(y) / 5: exponents are biased by 127, and log2(1 + m) lies 0.045 above m on average
FIFTH_ROOT = np.float32(1.2 * (127 - 0.0450466) * 2**23)


@njit(fastmath=FAST)
def _loss(error):
    """|error|^2.4 = (y z²)² with y = error², z = y^(−1/5): z is guessed from the exponent and corrected twice by
    (1 − h)^(−1/5) ≈ 1 + h/5 + 3h²/25, h = 1 − y z⁵. Relative error: that of a few float32 operations."""
    y = error * error
    z = np.int32(FIFTH_ROOT - np.float32(0.2) * np.float32(np.float32(y).view(np.int32))).view(np.float32)
    for _ in range(2):
        square = z * z
        h = np.float32(1) - y * z * (square * square)
        z += z * h * (np.float32(0.2) + np.float32(0.12) * h)
    root = y * (z * z)
    return root * root


@njit(fastmath=FAST)
def _sum(values, scale, zero, low, high):
    total = np.float32(0)
    for i in range(values.size):
        code = min(max(np.rint(values[i] / scale + zero), low), high)
        total += _loss((code - zero) * scale - values[i])
    return total


@njit(fastmath=FAST)
def _group_loss(values, scale, zero, low, high, best):
    """Σ|error|^2.4, or something above ``best`` once it is seen to exceed it."""
    total = 0.0
    for first in range(0, values.size, CHUNK):
        total += _sum(values[first : first + CHUNK], scale, zero, low, high)
        if total > best:
            break
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def _search(begin, end, values, scale, zero, low, high, chosen):
    for item in range(begin, end):
        group = values[item]
        smallest, largest = group.min(), group.max()
        best = np.inf
        for step in range(scale.shape[0]):
            size, offset = scale[step, item], zero[step, item]
            above = max(largest - (high - offset) * size, np.float32(0))
            below = max((low - offset) * size - smallest, np.float32(0))
            # the margin is for rounding: a sum in float32 may come out below its largest terms
            if np.float64(_loss(above) + _loss(below)) * 0.9999 > best:
                continue
            loss = _group_loss(group, size, offset, low, high, best)
            if loss < best:
                best = loss
                chosen[item] = step


def best_trial(values: Tensor, scale: Tensor, zero: Tensor, codes: tuple[int, int]) -> Tensor:
    """The trial of least Σ|error|^2.4 for each group of values; of equals the first.

    Args:
        values: (groups, size) float32, contiguous.
        scale, zero: (trials, groups) float32.
        codes: lowest and highest.

    Returns:
        (groups,) int64.
    """
    chosen = torch.zeros(len(values), dtype=torch.int64)
    bounds = np.float32(codes[0]), np.float32(codes[1])
    arrays = (values.numpy(), scale.numpy(), zero.numpy(), *bounds, chosen.numpy())
    share(_search, len(values), 1, torch.get_num_threads(), *arrays)
    return chosen
