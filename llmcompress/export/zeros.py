"""Codes with many zeros in fewer bytes, bit for bit: where the others lie, and the others in order.

| coding   | for                                              | where they lie                                      |
|----------|--------------------------------------------------|-----------------------------------------------------|
| `mask`   | any pattern                                      | a bit per code, the lowest first                    |
| `pairs`  | at most two of every four codes not zero (2:4)   | one of six pairs per four codes, three pairs a byte |

`pairs` takes 2/3 of a bit per code where a mask takes one. What counts as zero is a bit pattern, the most common one a
code of that width can have: 0 of a byte or a float, and 8 of an unsigned nibble, which is how 4-bit codes store zero.
Nibbles are kept as two a byte."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Bytes = NDArray[np.uint8]

#: the two kept places of four
_PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
_PER_BYTE = 3
#: unsigned nibble that stands for zero
NIBBLE_ZERO = 8


def encode(codes: Array, zero: int, bits: int) -> tuple[str, Bytes, Array]:
    """The coding that takes less, where the codes that are kept lie, and those codes.

    Args:
        codes: (n,) unsigned integers.
        zero: the code that is left out.
        bits: that each kept code takes.
    """
    kept = codes != zero
    fours = kept.reshape(-1, 4) if codes.size % 4 == 0 and codes.size else None
    if fours is not None and fours.sum(1).max() <= 2:
        by_pairs = codes.size * (8 / 12 + bits / 2)
        if by_pairs < codes.size + int(kept.sum()) * bits:
            pairs = _pair_of_each(fours)
            values = codes.reshape(-1, 4)[np.arange(len(pairs))[:, None], _PAIRS[pairs]].ravel()
            return "pairs", _pack_pairs(pairs), values
    return "mask", np.packbits(kept, bitorder="little"), codes[kept]


def decode(coding: str, where: Bytes, values: Array, count: int, zero: int) -> Array:
    """The inverse of ``encode``: (count,) codes."""
    codes = np.full(count, zero, values.dtype)
    if coding == "mask":
        codes[np.unpackbits(where, count=count, bitorder="little").astype(bool)] = values
        return codes
    pairs = _unpack_pairs(where, count // 4)
    codes.reshape(-1, 4)[np.arange(len(pairs))[:, None], _PAIRS[pairs]] = values.reshape(-1, 2)
    return codes


def to_nibbles(data: Bytes) -> Bytes:
    """Each byte as two codes, the low half first."""
    return np.stack([data & 15, data >> 4], -1).ravel()


def from_nibbles(nibbles: Bytes) -> Bytes:
    """The inverse; an odd number is filled up with a zero half."""
    even = np.append(nibbles, np.uint8(0)) if nibbles.size % 2 else nibbles
    return np.bitwise_or(even[::2], even[1::2] << 4, dtype=np.uint8)


def _pair_of_each(kept: NDArray[np.bool_]) -> Bytes:
    """The first pair of places that holds all that is kept of each four."""
    bits = (kept * np.array([1, 2, 4, 8], np.uint8)).sum(1)
    covers = [(1 << first) | (1 << second) for first, second in _PAIRS]
    table = [next((p for p, cover in enumerate(covers) if not mask & ~cover), 0) for mask in range(16)]
    return np.array(table, np.uint8)[bits]


def _pack_pairs(pairs: Bytes) -> Bytes:
    padded = np.append(pairs, np.zeros(-pairs.size % _PER_BYTE, np.uint8)).reshape(-1, _PER_BYTE)
    return (padded[:, 0] + 6 * padded[:, 1] + 36 * padded[:, 2]).astype(np.uint8)


def _unpack_pairs(packed: Bytes, count: int) -> Bytes:
    return np.stack([packed % 6, packed // 6 % 6, packed // 36], -1).ravel()[:count]
