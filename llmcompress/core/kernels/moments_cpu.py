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


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _add_squares_of_bits(begin, end, bits, total):
    """The same for bfloat16, whose bits are the upper half of a float32's."""
    sums = np.zeros(end - begin, np.float32)
    for t in range(bits.shape[0]):
        row = bits[t, begin:end]
        for j in range(end - begin):
            x = np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)
            sums[j] += x * x
    total[begin:end] += sums


def add_squares(total: Tensor, x: Tensor) -> None:
    """``total += Σ_t x_t²`` for float32 or bfloat16 ``x`` (tokens, in) and float32 ``total`` (in,)."""
    x = x.contiguous()
    if x.dtype == torch.bfloat16:
        kernel, array = _add_squares_of_bits, x.view(torch.uint16).numpy()
    else:
        kernel, array = _add_squares, x.float().numpy()
    share(kernel, x.shape[1], SPAN, torch.get_num_threads(), array, total.numpy())
