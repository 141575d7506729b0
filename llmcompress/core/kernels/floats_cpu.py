"""Rounding to floating-point numbers of few bits on a CPU, compiled by numba: one pass over the memory from values to
codes, one back, and one for the ranges that scales come from. torch takes a pass for each step, and slow ones where a
scale is for few columns.

Bit for bit what `llmcompress.core.floats` does in torch, for finite values."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share


def ranges(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every ``size`` columns of float32 ``x`` (rows, cols), and zero; (rows, cols / size)
    each."""
    low, high = (torch.empty(x.shape[0], x.shape[1] // size) for _ in range(2))
    _share(_ranges, x, low.numpy(), high.numpy())
    return low, high


def codes(x: Tensor, scale: Tensor, mantissa: int, bias: int, top: int, signed_zero: bool) -> Tensor:
    """The nearest codes of ``x / scale``, halves to the even one.

    Args:
        x: (rows, cols) float32.
        scale: (rows or 1, G) float32, each for cols / G columns.
        mantissa, bias: bits of the mantissa, and what is added to exponents.
        top: code of the largest magnitude; the bit above all of it is the sign's.
        signed_zero: negative values that go to zero keep their sign.

    Returns:
        (rows, cols) int8 with the codes' bits.
    """
    found = torch.empty(x.shape, dtype=torch.int8)
    sign, least = np.uint32(1 << top.bit_length()), np.float32(2.0 ** (1 - bias))
    given = np.uint32(23 - mantissa), np.uint32((127 - bias) << mantissa), least, np.uint32(top), sign, signed_zero
    _share(_codes, x, _by_row(scale, x), found.view(torch.uint8).numpy(), *given)
    return found


def values(codes: Tensor, scale: Tensor, table: Tensor, out: Tensor) -> None:
    """Writes what codes stand for, times their scales.

    Args:
        codes: (rows, cols) int8.
        scale: as in `codes`.
        table: float32 numbers of the codes by their bits, as many as there are.
        out: (rows, cols) float32, contiguous.
    """
    _share(_values, codes.view(torch.uint8), _by_row(scale, codes), table.numpy(), out.numpy())


def _by_row(scale: Tensor, x: Tensor) -> np.ndarray:
    return scale.expand(len(x), -1).contiguous().numpy()


def _share(kernel, x: Tensor, *rest: object) -> None:  # type: ignore[no-untyped-def]
    share(kernel, len(x), 1, torch.get_num_threads(), x.detach().contiguous().numpy(), *rest)


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _ranges(begin, end, x, low, high):  # pragma: no cover (compiled)
    size = x.shape[1] // low.shape[1]
    for r in range(begin, end):
        for g in range(low.shape[1]):
            part = x[r, g * size : (g + 1) * size]
            least = most = np.float32(0)
            for i in range(size):
                least, most = min(least, part[i]), max(most, part[i])
            low[r, g], high[r, g] = least, most


@njit(nogil=True, cache=True, error_model="numpy")
def _codes(begin, end, x, scale, codes, cut, rebias, least, top, sign, signed_zero):  # pragma: no cover (compiled)
    """Below the smallest normal number, ``least``, steps are even; above it, a float32's bits are cut to the
    mantissa."""
    size = x.shape[1] // scale.shape[1]
    steps = np.float32(1 << (np.uint32(23) - cut)) / least
    below_half = np.uint32((1 << (cut - np.uint32(1))) - 1)
    for r in range(begin, end):
        for g in range(scale.shape[1]):
            part, to, s = x[r, g * size : (g + 1) * size], codes[r, g * size : (g + 1) * size], scale[r, g]
            for i in range(size):
                exact = np.float32(part[i] / s)
                bits = np.float32(exact).view(np.uint32)
                magnitude = bits & np.uint32(0x7FFFFFFF)
                subnormal = np.uint32(np.rint(min(abs(exact), least) * steps))
                normal = ((magnitude + below_half + ((magnitude >> cut) & np.uint32(1))) >> cut) - rebias
                code = subnormal if abs(exact) < least else min(normal, top)
                negative = (bits != magnitude) and (signed_zero or code != 0)
                to[i] = np.uint8(code | sign if negative else code)


@njit(nogil=True, cache=True)
def _values(begin, end, codes, scale, table, out):  # pragma: no cover (compiled)
    size = codes.shape[1] // scale.shape[1]
    for r in range(begin, end):
        for g in range(scale.shape[1]):
            part, to, s = codes[r, g * size : (g + 1) * size], out[r, g * size : (g + 1) * size], scale[r, g]
            for i in range(size):
                to[i] = table[part[i]] * s
