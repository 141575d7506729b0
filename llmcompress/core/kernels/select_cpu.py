"""Selection of the highest scores on a CPU, compiled by numba: over a whole tensor, or within every part of a row.

Radix selection, in three passes over the bits: floats sort like their bits, once those of negative ones are turned
around. Ties go to the later position everywhere, so that counts are exact and results the same every time.

Loops run over slices: an index that may be negative for all the compiler knows costs as much as the rest."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share

#: pieces of a selection over a whole tensor
CHUNKS = 16
#: up to this size every score of a part is compared with every other
SMALL = 32
#: parts that are compared side by side
LANES = 64
#: values whose answers are counted at once
COUNTED = 4096


@njit(nogil=True, cache=True)
def _keep_of_four(begin, end, score, drop, keep):
    """`_keep_small` for the size of 2:4, written out."""
    x, kept = score.reshape(-1)[begin * 4 : end * 4], keep.reshape(-1)[begin * 4 : end * 4]
    for p in range(end - begin):
        a, b, c, d = x[4 * p], x[4 * p + 1], x[4 * p + 2], x[4 * p + 3]
        ab, ac, ad = np.int32(a <= b), np.int32(a <= c), np.int32(a <= d)
        bc, bd, cd = np.int32(b <= c), np.int32(b <= d), np.int32(c <= d)
        kept[4 * p] = 3 - ab - ac - ad >= drop
        kept[4 * p + 1] = ab + 2 - bc - bd >= drop
        kept[4 * p + 2] = ac + bc + 1 - cd >= drop
        kept[4 * p + 3] = ad + bd + cd >= drop


@njit(nogil=True, cache=True)
def _keep_small(begin, end, score, drop, keep):
    """Counts for each score how many of its part are below it, for parts side by side in vector registers."""
    size = score.shape[1]
    values, below = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.int32)
    for first in range(begin, end, LANES):
        parts, kept = score[first : min(first + LANES, end)], keep[first : min(first + LANES, end)]
        for p in range(len(parts)):
            for c in range(size):
                values[c, p] = parts[p, c]
        below[:] = 0
        for c in range(size):
            for d in range(c):
                later, earlier, below_later, below_earlier = values[c], values[d], below[c], below[d]
                for p in range(LANES):
                    later_wins = np.int32(earlier[p] <= later[p])
                    below_later[p] += later_wins
                    below_earlier[p] += np.int32(1) - later_wins
        for p in range(len(parts)):
            for c in range(size):
                kept[p, c] = below[c, p] >= drop


@njit(nogil=True, cache=True)
def _keep_large(begin, end, bits, drop, keep):
    size = bits.shape[1]
    keys, counts = np.empty((2, size), np.uint32), np.empty(2048, np.int64)
    key, left = keys[0], keys[1]
    for part in range(begin, end):
        row, kept = bits[part], keep[part]
        for i in range(size):
            b = row[i]
            if b == np.int32(-2147483648):  # minus zero equals zero
                b = np.int32(0)
            key[i] = np.uint32(b) ^ (np.uint32(0xFFFFFFFF) if b < 0 else np.uint32(0x80000000))
        prefix, before, among = np.uint32(0), 0, key
        for shift, width in ((np.uint32(21), 11), (np.uint32(10), 11), (np.uint32(0), 10)):
            counts[:] = 0
            digits = np.uint32((1 << width) - 1)
            for k in among:
                counts[(k >> shift) & digits] += 1
            digit = 0
            while before + counts[digit] < drop:
                before += counts[digit]
                digit += 1
            prefix = (prefix << np.uint32(width)) | np.uint32(digit)
            count = 0
            for k in among:
                left[count] = k
                count += ((k >> shift) & digits) == np.uint32(digit)
            among = left[:count]
        for i in range(size):
            kept[i] = key[i] >= prefix
        ties, i = drop - before, 0
        while ties > 0:
            if key[i] == prefix:
                kept[i] = False
                ties -= 1
            i += 1


def keep_highest_of_each(score: Tensor, drop: int) -> Tensor:
    """False for exactly the ``drop`` lowest scores of every part.

    Args:
        score: (parts, size) float32, contiguous; negative and infinite values are allowed, NaN is not.
        drop: how many go, fewer than ``size``.

    Returns:
        (parts, size) bool.
    """
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    array, size, keep = score.numpy(), score.shape[1], np.empty(score.shape, np.bool_)
    kernel, given = (_keep_small, array) if size <= SMALL else (_keep_large, array.view(np.int32))
    share(_keep_of_four if size == 4 else kernel, len(score), 1, torch.get_num_threads(), given, drop, keep)
    return torch.from_numpy(keep)


@njit(nogil=True, cache=True)
def _histogram(begin, end, bits, prefix, high_shift, low_shift, counts):
    """counts[chunk] of the bits between the shifts, among scores whose higher bits are ``prefix``."""
    size = (bits.size + CHUNKS - 1) // CHUNKS
    digits = np.uint32((1 << (high_shift - low_shift)) - 1)
    for chunk in range(begin, end):
        mine = counts[chunk]
        for b in bits[chunk * size : (chunk + 1) * size]:
            if b >> np.uint32(high_shift) == prefix:
                mine[(b >> np.uint32(low_shift)) & digits] += 1


@njit(nogil=True, cache=True)
def _above(begin, end, bits, threshold, ties, keep):
    """keep = bits > threshold; of those equal, each chunk drops its first ``ties[chunk]``."""
    size = (bits.size + CHUNKS - 1) // CHUNKS
    for chunk in range(begin, end):
        part, kept = bits[chunk * size : (chunk + 1) * size], keep[chunk * size : (chunk + 1) * size]
        for i in range(part.size):
            kept[i] = part[i] >= threshold
        left, i = ties[chunk], 0
        while left > 0:
            if part[i] == threshold:
                kept[i] = False
                left -= 1
            i += 1


def keep_highest(score: Tensor, drop: int) -> Tensor:
    """False for exactly the ``drop`` lowest scores; ties go to the later position.

    Args:
        score: float32, not negative, contiguous.
        drop: how many go.

    Returns:
        bool, shaped like ``score``.
    """
    bits = score.numpy().reshape(-1).view(np.uint32)
    threads = torch.get_num_threads()
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    keep = np.empty(bits.shape, np.bool_)
    prefix, before = 0, 0
    for high_shift, low_shift in ((31, 20), (20, 9), (9, 0)):
        counts = np.zeros((CHUNKS, 2048), np.int64)
        share(_histogram, CHUNKS, 1, threads, bits, np.uint32(prefix), high_shift, low_shift, counts)
        reached = before + np.cumsum(counts.sum(0))
        bucket = int(np.searchsorted(reached, drop))
        before = int(reached[bucket - 1]) if bucket else before
        prefix = (prefix << (high_shift - low_shift)) | bucket
    equal = counts[:, bucket]
    earlier = np.cumsum(equal) - equal
    share(_above, CHUNKS, 1, threads, bits, np.uint32(prefix), np.clip(drop - before - earlier, 0, equal), keep)
    return torch.from_numpy(keep).view(score.shape)


@njit(nogil=True, cache=True)
def _zero(begin, end, values, keep):
    part, kept = values[begin:end], keep[begin:end]
    for i in range(part.size):
        part[i] = part[i] if kept[i] else np.float32(0)


def zero_dropped(values: Tensor, keep: Tensor) -> None:
    """Zeroes contiguous float32 ``values`` in place where the contiguous ``keep`` is False."""
    share(_zero, values.numel(), 1, torch.get_num_threads(), values.view(-1).numpy(), keep.view(-1).numpy())


@njit(nogil=True, cache=True)
def _count(begin, end, bits, all_but_sign, counts):
    for piece in range(begin, end):
        found = 0
        for b in bits[piece * COUNTED : (piece + 1) * COUNTED]:
            found += (b & all_but_sign) != 0
        counts[piece] = found


def count_nonzero(values: Tensor) -> int:
    """How many of contiguous float32 or bfloat16 ``values`` are neither zero nor minus zero."""
    bits = values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).view(-1).numpy()
    counts = np.zeros(-(-bits.size // COUNTED), np.int64)
    share(_count, counts.size, 1, torch.get_num_threads(), bits, np.iinfo(bits.dtype).max, counts)
    return int(counts.sum())
