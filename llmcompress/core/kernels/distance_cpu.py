"""How far two matrices are apart on a CPU, compiled by numba: one pass over both. torch writes the difference and its
squares to memory first, which takes ten times as long."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share


def squares(dense: Tensor, stored: Tensor) -> tuple[float, float]:
    """‖W − Q‖² and ‖W‖², whatever the number of threads.

    Args:
        dense: W (out, in) float32 or bfloat16.
        stored: Q (out, in) float32.
    """
    lost, meant = np.empty(len(stored), np.float32), np.empty(len(stored), np.float32)
    if dense.dtype == torch.bfloat16:
        kernel, array = _squares_of_bits, dense.contiguous().view(torch.uint16).numpy()
    else:
        kernel, array = _squares, dense.contiguous().numpy()
    share(kernel, len(stored), 1, torch.get_num_threads(), array, stored.contiguous().numpy(), lost, meant)
    return float(lost.sum(dtype=np.float64)), float(meant.sum(dtype=np.float64))


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def _squares(begin, end, dense, stored, lost, meant):  # pragma: no cover (compiled)
    for r in range(begin, end):
        W, Q = dense[r], stored[r]
        difference = length = np.float32(0)
        for i in range(W.size):
            wrong = W[i] - Q[i]
            difference += wrong * wrong
            length += W[i] * W[i]
        lost[r], meant[r] = difference, length


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"})
def _squares_of_bits(begin, end, bits, stored, lost, meant):  # pragma: no cover (compiled)
    """The same for bfloat16, whose bits are the upper half of a float32's."""
    for r in range(begin, end):
        W, Q = bits[r], stored[r]
        difference = length = np.float32(0)
        for i in range(W.size):
            value = np.uint32(np.uint32(W[i]) << np.uint32(16)).view(np.float32)
            wrong = value - Q[i]
            difference += wrong * wrong
            length += value * value
        lost[r], meant[r] = difference, length
