"""4-bit weights as torch packs them for its CPU kernel, widened to bfloat16 a tile at a time.

torch's layout with AVX-512: rows in blocks of 64; within a block, for each column 32 bytes, whose low halves are rows
0–31 and high halves rows 32–63. The tile comes out transposed, (columns, rows), which is the order it lies in."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share
from llmcompress.runtime.rows import _rounded

#: rows that torch packs together
BLOCK = 64
_HALF = BLOCK // 2


@njit(cache=True, nogil=True)
def _widen_half(codes, shift, scale, offset, to):  # pragma: no cover (compiled)
    """One half of the bytes of a column: slices, so that the loop has plain indices and vectorises."""
    for j in range(_HALF):
        value = np.float32(np.int32((codes[j] >> shift) & np.uint8(15)) - np.int32(8))
        to[j] = np.uint16(_rounded(value * scale[j] + offset[j]))


@njit(cache=True, nogil=True)
def _widen(first, last, packed, scales, offsets, group, out):  # pragma: no cover
    """Columns [first, last) of all blocks."""
    for b in range(packed.shape[0]):
        low, mid, high = b * BLOCK, b * BLOCK + _HALF, (b + 1) * BLOCK
        for k in range(first, last):
            g = k // group
            _widen_half(packed[b, k], np.uint8(0), scales[g, low:mid], offsets[g, low:mid], out[k, low:mid])
            _widen_half(packed[b, k], np.uint8(4), scales[g, mid:high], offsets[g, mid:high], out[k, mid:high])


def widen(packed: Tensor, levels: Tensor, group: int) -> Tensor:
    """The weights of some rows, transposed.

    Args:
        packed: (rows, columns / 2) uint8, rows a multiple of BLOCK.
        levels: (columns / group, rows, 2) bfloat16: scale and offset.
        group: columns that share a scale.

    Returns:
        (columns, rows) bfloat16.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty(columns, rows, dtype=torch.bfloat16)
    blocks = packed.reshape(rows // BLOCK, columns, _HALF).numpy()
    scales, offsets = levels[..., 0].float().numpy(), levels[..., 1].float().numpy()
    arrays = blocks, scales, offsets, group, out.view(torch.uint16).numpy()
    share(_widen, columns, group, torch.get_num_threads(), *arrays)
    return out
