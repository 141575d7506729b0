"""What stands around an integer product on the CPU, each in one pass: an activation's rows to unsigned codes, and the
accumulated rows back to floating point.

torch takes eight passes over the rows for the first and three for the second, which at 512 tokens costs as much as the
product between them (measured: W8A8 is then hardly faster than bfloat16). Rows are independent; above a size they are
shared among plain threads, as in `llmcompress.core.kernels`."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from llmcompress.core.kernels.threads import share

#: entries below which starting a thread costs more than it saves
SHARED_ENTRIES = 1 << 18
#: unsigned code of zero: oneDNN multiplies uint8 by int8 fast, int8 by int8 by a reference loop
ZERO_POINT = 128
#: 2^23 + 2^22: adding it to a small float leaves the rounded integer (ties to even) in the lowest bits
_MAGIC = np.float32(12582912.0)


@intrinsic
def _as_float(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@njit(inline="always")
def _rounded(value):  # pragma: no cover (compiled)
    """float32 → the bits of the nearest bfloat16, ties to even, as a uint32."""
    bits = _as_bits(value)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(cache=True, nogil=True)
def _codes_of_half(first, last, x, half_span, codes, scales, columns):  # pragma: no cover
    """Rows of bfloat16 bits."""
    top = np.float32(np.floor(half_span))
    for t in range(first, last):
        row, out = x[t], codes[t]
        high = np.uint16(0)
        for i in range(columns):
            high = max(high, row[i] & np.uint16(0x7FFF))
        scale = _as_float(_rounded(_as_float(np.uint32(high) << np.uint32(16)) / half_span) << np.uint32(16))
        if scale == 0:
            scale = np.float32(0.0078125)
        scales[t] = scale
        for i in range(columns):
            exact = _as_float(np.uint32(row[i]) << np.uint32(16)) / scale
            exact = min(max(exact, -top - np.float32(1)), top)
            out[i] = np.uint8((_as_bits(exact + _MAGIC) + np.uint32(ZERO_POINT)) & np.uint32(0xFF))


@njit(cache=True, nogil=True)
def _codes_of_single(first, last, x, half_span, codes, scales, columns):  # pragma: no cover
    """Rows of float32."""
    top = np.float32(np.floor(half_span))
    for t in range(first, last):
        row, out = x[t], codes[t]
        high = np.float32(0)
        for i in range(columns):
            high = max(high, abs(row[i]))
        scale = high / half_span
        if scale == 0:
            scale = np.float32(1.1920929e-07)
        scales[t] = scale
        for i in range(columns):
            exact = min(max(row[i] / scale, -top - np.float32(1)), top)
            out[i] = np.uint8((_as_bits(exact + _MAGIC) + np.uint32(ZERO_POINT)) & np.uint32(0xFF))


@njit(cache=True, nogil=True)
def _scaled_to_half(first, last, sums, scales, out, columns):  # pragma: no cover
    for t in range(first, last):
        scale, row, to = scales[t], sums[t], out[t]
        for i in range(columns):
            to[i] = np.uint16(_rounded(row[i] * scale))


def row_codes(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric codes per row, as `QuantGrid(bits, group="token", dynamic=True)` chooses them, plus ZERO_POINT.

    Args:
        x: (T, I) bfloat16 or float32, contiguous, on the CPU.
        bits: 2 to 8.

    Returns:
        Codes (T, I) uint8, and scales (T, 1) float32 that are exact in ``x``'s dtype.
    """
    codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    kernel, values = _codes_of_single, x
    if x.dtype == torch.bfloat16:
        kernel, values = _codes_of_half, x.view(torch.uint16)
    half_span = np.float32(((1 << bits) - 1) / 2)
    _over_rows(kernel, x.shape, values.numpy(), half_span, codes.numpy(), scales.view(-1).numpy(), x.shape[1])
    return codes, scales


def scaled_rows(sums: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row of ``sums`` times its scale, in ``dtype``.

    Args:
        sums: (T, O) float32, contiguous; it may be overwritten.
        scales: (T, 1) float32.
        dtype: of the result.
    """
    if dtype != torch.bfloat16:
        return sums.mul_(scales).to(dtype)
    out = torch.empty(sums.shape, dtype=dtype)
    arrays = sums.numpy(), scales.view(-1).numpy(), out.view(torch.uint16).numpy()
    _over_rows(_scaled_to_half, sums.shape, *arrays, sums.shape[1])
    return out


def _over_rows(kernel, shape, *arguments) -> None:
    """All rows at once, or a share for each of torch's threads."""
    rows, columns = shape
    if rows * columns < SHARED_ENTRIES:
        kernel(0, rows, *arguments)
    else:
        share(kernel, rows, 1, torch.get_num_threads(), *arguments)
