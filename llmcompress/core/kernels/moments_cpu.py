"""Sums over rows on a CPU, compiled by numba: one pass over the memory, columns side by side in vector registers."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share

#: columns that one thread takes at a time
SPAN = 512


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _add_squares(begin, end, x, total):
    sums = np.zeros(end - begin, np.float32)
    for t in range(x.shape[0]):
        row = x[t, begin:end]
        for j in range(end - begin):
            sums[j] += row[j] * row[j]
    total[begin:end] += sums


def add_squares(total: Tensor, x: Tensor) -> None:
    """``total += Σ_t x_t²`` for float32 ``x`` (tokens, in), contiguous, and ``total`` (in,)."""
    share(_add_squares, x.shape[1], SPAN, torch.get_num_threads(), x.numpy(), total.numpy())
