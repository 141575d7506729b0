"""4-bit weights as torch packs them for its CPU kernel, widened to bfloat16 a tile at a time.

torch's layout with AVX-512: rows in blocks of 64; within a block, for each column 32 bytes, whose low halves are rows
0–31 and high halves rows 32–63. The tile comes out transposed, (columns, rows), which is the order it lies in.

In torch's operations, on eight codes a word where words do. A compiled loop takes half the time, which beside the
product that follows is little, and brings 32 MB of compiler into a process that is to be small."""

from __future__ import annotations

import torch
from torch import Tensor

#: rows that torch packs together
BLOCK = 64
_HALF = BLOCK // 2
#: the low half of each byte of a word
_LOW = 0x0F0F0F0F0F0F0F0F


def widen(packed: Tensor, levels: Tensor, group: int) -> Tensor:
    """The weights of some rows, transposed.

    Args:
        packed: (rows, columns / 2) uint8, contiguous, rows a multiple of BLOCK.
        levels: (columns / group, rows, 2) bfloat16: scale and offset.
        group: columns that share a scale.

    Returns:
        (columns, rows) bfloat16.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    words = packed.view(rows // BLOCK, columns, _HALF).view(torch.int64)
    codes = torch.empty(columns, rows // BLOCK, 2, _HALF // 8, dtype=torch.int64)
    codes[:, :, 0] = (words & _LOW).transpose(0, 1)
    codes[:, :, 1] = (words >> 4).bitwise_and_(_LOW).transpose(0, 1)
    values = codes.view(torch.int8).sub_(8).to(torch.bfloat16).view(columns // group, group, rows)
    scale, offset = (part.contiguous().unsqueeze(1) for part in levels.unbind(-1))
    return torch.addcmul(offset, values, scale, out=values).view(columns, rows)
