"""Selection of the highest scores on a CPU, compiled by numba: over a whole tensor, or within every part of a row.

Radix selection, in three passes over the bits: floats sort like their bits, once those of negative ones are turned
around. Ties go to the later position everywhere, so that counts are exact and results the same every time."""

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


@njit(nogil=True, cache=True)
def _keep_small(begin, end, score, drop, keep):
    size = score.shape[1]
    below = np.empty(size, np.int64)
    for part in range(begin, end):
        for c in range(size):
            below[c] = 0
            for d in range(c):
                later_wins = score[part, d] <= score[part, c]
                below[c] += later_wins
                below[d] += not later_wins
        for c in range(size):
            keep[part, c] = below[c] >= drop


@njit(nogil=True, cache=True)
def _keep_large(begin, end, bits, drop, keep):
    size = bits.shape[1]
    keys, counts = np.empty(size, np.uint32), np.empty(2048, np.int64)
    for part in range(begin, end):
        for i in range(size):
            b = bits[part, i]
            if b == np.int32(-2147483648):  # minus zero equals zero
                b = np.int32(0)
            keys[i] = np.uint32(b) ^ (np.uint32(0xFFFFFFFF) if b < 0 else np.uint32(0x80000000))
        prefix, before = np.uint32(0), 0
        for shift, width in ((21, 11), (10, 11), (0, 10)):
            counts[:] = 0
            above, digits = np.uint32(shift + width), np.uint32((1 << width) - 1)
            for i in range(size):
                if shift == 21 or keys[i] >> above == prefix:
                    counts[(keys[i] >> np.uint32(shift)) & digits] += 1
            digit = 0
            while before + counts[digit] < drop:
                before += counts[digit]
                digit += 1
            prefix = (prefix << np.uint32(width)) | np.uint32(digit)
        ties = drop - before
        for i in range(size):
            tied = keys[i] == prefix
            keep[part, i] = (keys[i] > prefix) | (tied & (ties <= 0))
            ties -= tied


def keep_highest_of_each(score: Tensor, drop: int) -> Tensor:
    """False for exactly the ``drop`` lowest scores of every part.

    Args:
        score: (parts, size) float32, contiguous; negative and infinite values are allowed, NaN is not.
        drop: how many go, fewer than ``size``.

    Returns:
        (parts, size) bool.
    """
    keep = np.ones(score.shape, np.bool_)
    if drop > 0:
        array, size = score.numpy(), score.shape[1]
        kernel, given = (_keep_small, array) if size <= SMALL else (_keep_large, array.view(np.int32))
        share(kernel, len(score), 1, torch.get_num_threads(), given, drop, keep)
    return torch.from_numpy(keep)


@njit(nogil=True, cache=True)
def _histogram(begin, end, bits, prefix, high_shift, low_shift, counts):
    """counts[chunk] of the bits between the shifts, among scores whose higher bits are ``prefix``."""
    size = (bits.size + CHUNKS - 1) // CHUNKS
    digits = (1 << (high_shift - low_shift)) - 1
    for chunk in range(begin, end):
        mine = counts[chunk]
        for i in range(chunk * size, min(bits.size, (chunk + 1) * size)):
            if bits[i] >> high_shift == prefix:
                mine[(bits[i] >> low_shift) & digits] += 1


@njit(nogil=True, cache=True)
def _above(begin, end, bits, threshold, ties, keep):
    """keep = bits > threshold; of those equal, each chunk drops its first ``ties[chunk]``."""
    size = (bits.size + CHUNKS - 1) // CHUNKS
    for chunk in range(begin, end):
        first, last = chunk * size, min(bits.size, (chunk + 1) * size)
        for i in range(first, last):
            keep[i] = bits[i] >= threshold
        left, i = ties[chunk], first
        while left > 0:
            if bits[i] == threshold:
                keep[i] = False
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
    bits = score.numpy().reshape(-1).view(np.int32)
    threads = torch.get_num_threads()
    keep = np.ones(bits.shape, np.bool_)
    if drop <= 0:
        return torch.from_numpy(keep).view(score.shape)
    prefix, before = 0, 0
    for high_shift, low_shift in ((31, 20), (20, 9), (9, 0)):
        counts = np.zeros((CHUNKS, 2048), np.int64)
        share(_histogram, CHUNKS, 1, threads, bits, prefix, high_shift, low_shift, counts)
        reached = before + np.cumsum(counts.sum(0))
        bucket = int(np.searchsorted(reached, drop))
        before = int(reached[bucket - 1]) if bucket else before
        prefix = (prefix << (high_shift - low_shift)) | bucket
    equal = counts[:, bucket]
    earlier = np.cumsum(equal) - equal
    share(_above, CHUNKS, 1, threads, bits, prefix, np.clip(drop - before - earlier, 0, equal), keep)
    return torch.from_numpy(keep).view(score.shape)


@njit(nogil=True, cache=True)
def _zero(begin, end, values, keep):
    for i in range(begin, end):
        values[i] = values[i] if keep[i] else np.float32(0)


def zero_dropped(values: Tensor, keep: Tensor) -> None:
    """Zeroes contiguous float32 ``values`` in place where the contiguous ``keep`` is False."""
    share(_zero, values.numel(), 1, torch.get_num_threads(), values.view(-1).numpy(), keep.view(-1).numpy())
