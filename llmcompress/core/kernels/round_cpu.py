"""Values rounded to symmetric integers on a CPU, a scale for each row, compiled by numba: the row is read once for its
scale and, still in the first cache, once more to be rounded. torch takes a pass over the memory for each step.

Bit for bit what `llmcompress.core.grid.QuantGrid` does in torch. Magnitudes are compared as bits, which sort like
them, and a value that is not a number above all others: its whole row becomes that, as in torch."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share


def round_rows(x: Tensor, bits: int) -> Tensor:
    """Each row on the grid of ``bits`` over its own range, by a scale of the dtype of ``x``.

    Args:
        x: (rows, cols) float32 or bfloat16.
        bits: 2 to 8.

    Returns:
        New, like ``x``.
    """
    x, rounded = x.detach().contiguous(), torch.empty(x.shape, dtype=x.dtype)
    half_span, top = np.float32(((1 << bits) - 1) / 2), np.float32((1 << (bits - 1)) - 1)
    given = half_span, top, np.float32(torch.finfo(x.dtype).eps)
    if x.dtype == torch.bfloat16:
        kernel, word = _round_rows_of_bits, torch.uint16
        arrays = [x.view(word).numpy(), rounded.view(word).numpy()]
    else:
        kernel = _round_rows
        arrays = [x.numpy(), x.view(torch.int32).numpy(), rounded.numpy()]
    share(kernel, len(x), 1, torch.get_num_threads(), *arrays, *given)
    return rounded


@njit
def _on_grid(value, scale, top):  # pragma: no cover (compiled)
    code = min(max(np.rint(value / scale), -top - np.float32(1)), top)
    return code * scale + np.float32(0)  # not minus zero, which no code stands for


@njit(nogil=True, cache=True)
def _round_rows(begin, end, x, bits, rounded, half_span, top, least):  # pragma: no cover (compiled)
    for r in range(begin, end):
        row, row_bits, to = x[r], bits[r], rounded[r]
        largest = np.int32(0)
        for i in range(row.size):
            largest = max(largest, row_bits[i] & np.int32(0x7FFFFFFF))
        scale = np.int32(largest).view(np.float32) / half_span
        scale = least if scale == 0 else scale
        for i in range(row.size):
            to[i] = _on_grid(row[i], scale, top)


@njit
def _value(bits):  # pragma: no cover (compiled)
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit
def _bits(value):  # pragma: no cover (compiled)
    """Of the nearest bfloat16, of two the even one."""
    b = np.float32(value).view(np.uint32)
    return np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _round_rows_of_bits(begin, end, bits, rounded, half_span, top, least):  # pragma: no cover (compiled)
    """The same for bfloat16, whose bits are the upper half of a float32's."""
    for r in range(begin, end):
        row, to = bits[r], rounded[r]
        largest = np.uint16(0)
        for i in range(row.size):
            largest = max(largest, np.uint16(row[i] & np.uint16(0x7FFF)))
        scale = _value(_bits(np.float32(_value(np.uint16(largest)) / half_span)))
        scale = least if scale == 0 else scale
        for i in range(row.size):
            to[i] = _bits(np.float32(_on_grid(_value(row[i]), scale, top)))
