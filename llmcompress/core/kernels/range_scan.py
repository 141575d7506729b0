"""The sorted-token scan on the CPU: how far each output of a row still reaches when one of its weights is gone.

For a row of outputs Y_t = Σ_i X_ti W_i, removing weight i leaves the maximum max_t(Y_t − X_ti W_i). The most
extreme token of input i is looked up; every other token gains at most reach_i, from the second most extreme. So,
walking the tokens down from the largest Y with gap_t = max Y − Y_t, nothing can win once gap_t ≥ reach_i − best_i.
A handful of tokens settles most weights: those are scanned for the whole row at once (SIMD over the inputs), then
the few inputs still open are carried on as a list. Tokens come off a heap, so any number of them can be asked for
and the answer is exact whatever the data. The minimum is the same scan of −Y with −W.

Rows are independent and run in parallel, in plain threads: numba's own pool beside torch's would be a second OpenMP
runtime, whose threads wait for work by spinning on the cores that the other needs (measured: ten times slower on a
busy machine). `llmcompress.core.salience` has the mathematics around it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

#: lets maxima and counts vectorise; infinities stay legal
_FAST = {"nnan", "nsz", "contract"}
#: the open inputs become a list once fewer than one in this many is open
_SPARSE = 6
#: columns of a strip in the search for the extremes: 4 cache lines
_STRIP = 64


class Extremes(NamedTuple):
    """The most negative (index 0) and most positive (index 1) entries of every column of X.

    Attributes:
        token: (2, in) int32, where the extreme is.
        first: (2, in) float32, max_t of −X and of X.
        second: (2, in) float32, the same without that token; equal to ``first`` if there is only one.
    """

    token: Tensor
    first: Tensor
    second: Tensor


@njit(cache=True, nogil=True, fastmath=_FAST)
def _column_extremes(x, token, first, second, worker, workers):  # pragma: no cover (compiled)
    """The share of one worker: every ``workers``-th strip of columns."""
    rows, columns = x.shape
    for strip in range(worker, (columns + _STRIP - 1) // _STRIP, workers):
        for t in range(rows):
            for i in range(strip * _STRIP, min(columns, (strip + 1) * _STRIP)):
                value = x[t, i]
                if -value > second[0, i]:
                    if -value > first[0, i]:
                        second[0, i], first[0, i], token[0, i] = first[0, i], -value, t
                    else:
                        second[0, i] = -value
                if value > second[1, i]:
                    if value > first[1, i]:
                        second[1, i], first[1, i], token[1, i] = first[1, i], value, t
                    else:
                        second[1, i] = value


@njit(cache=True, nogil=True, fastmath=_FAST)
def _settle(x, w, reach, best, gap, next_gap):  # pragma: no cover
    """One token for all inputs; returns how many inputs the next token could still raise."""
    still_open = 0
    for i in range(w.size):
        value = -gap - x[i] * w[i]
        held = best[i]
        held = value if value > held else held
        best[i] = held
        still_open += reach[i] - held > next_gap
    return still_open


@njit(cache=True, nogil=True, fastmath=_FAST)
def _settle_listed(x, w, reach, best, gap, listed, count):  # pragma: no cover
    """One token for the listed inputs; drops those it can no longer raise and returns how many stay."""
    kept = 0
    for j in range(count):
        i = listed[j]
        if reach[i] - best[i] > gap:
            value = -gap - x[i] * w[i]
            if value > best[i]:
                best[i] = value
            listed[kept] = i
            kept += 1
    return kept


@njit(cache=True, nogil=True, fastmath=_FAST)
def _look_up(w, token, first, second, at, gain, reach):  # pragma: no cover
    """Every input's extreme token for weights ``w``: where it is, what it gains, what any other may gain."""
    for i in range(w.size):
        size, lowers = abs(w[i]), w[i] > 0
        # both are loaded before one is taken: a branch on the sign would be guessed wrong half of the time
        low_token, high_token = token[0, i], token[1, i]
        low_first, high_first = first[0, i], first[1, i]
        low_second, high_second = second[0, i], second[1, i]
        at[i] = low_token if lowers else high_token
        gain[i] = size * (low_first if lowers else high_first)
        reach[i] = size * (low_second if lowers else high_second)


@njit(cache=True, nogil=True, fastmath=_FAST)
def _settle_extremes(y, sign, peak, at, gain, reach, best):  # pragma: no cover
    """Every input's own extreme token; returns the largest gap that can still matter."""
    furthest = np.float32(-np.inf)
    for i in range(best.size):
        value = sign * y[np.uint32(at[i])] - peak + gain[i]
        held = best[i]
        held = value if value > held else held
        best[i] = held
        furthest = max(furthest, reach[i] - held)
    return furthest


@njit(cache=True, nogil=True)
def _sift(gaps, tokens, root, size):  # pragma: no cover
    """Restores the min-heap below ``root``."""
    gap, token = gaps[root], tokens[root]
    child = 2 * root + 1
    while child < size:
        if child + 1 < size and gaps[child + 1] < gaps[child]:
            child += 1
        if gaps[child] >= gap:
            break
        gaps[root], tokens[root] = gaps[child], tokens[child]
        root, child = child, 2 * child + 1
    gaps[root], tokens[root] = gap, token


@njit(cache=True, nogil=True, fastmath=_FAST)
def _collect(y, sign, peak, furthest, lead, gaps, tokens):  # pragma: no cover
    """Heap of the tokens other than ``lead`` whose gap is below ``furthest``; returns its size."""
    size = 0
    for t in range(y.size):
        gap = peak - sign * y[t]
        if gap < furthest and t != lead:
            gaps[size], tokens[size] = gap, t
            size += 1
    for root in range(size // 2 - 1, -1, -1):
        _sift(gaps, tokens, root, size)
    return size


@njit(cache=True, nogil=True, fastmath=_FAST)
def _walk_heap(x, w, reach, best, gaps, tokens, size, listed):  # pragma: no cover
    """Settles the tokens of the heap in order of their gap until no input is open."""
    count = -1  # not listed yet
    while size > 0 and count != 0:
        gap, token = gaps[0], tokens[0]
        size -= 1
        gaps[0], tokens[0] = gaps[size], tokens[size]
        _sift(gaps, tokens, 0, size)
        if count > 0:
            count = _settle_listed(x[token], w, reach, best, gap, listed, count)
            continue
        next_gap = gaps[0] if size > 0 else np.float32(np.inf)
        still_open = _settle(x[token], w, reach, best, gap, next_gap)
        if still_open * _SPARSE < w.size:
            count = 0
            for i in range(w.size):
                listed[count] = i
                count += reach[i] - best[i] > next_gap


@njit(cache=True, nogil=True, fastmath=_FAST)
def _scan(y, sign, x, w, extremes, peak, best, reach, gain, gaps, tokens, listed):  # pragma: no cover
    """Raises ``best`` (in,), relative to ``peak``, by the tokens of one chunk; returns the new peak."""
    high = sign * y[0]
    for t in range(1, y.size):
        high = max(high, sign * y[t])
    lead = 0
    while lead < y.size - 1 and sign * y[lead] != high:
        lead += 1
    if high > peak:
        for i in range(w.size):
            best[i] -= high - peak
        peak = high
    _settle(x[lead], w, reach, best, peak - high, np.float32(0))
    _look_up(w, extremes[0], extremes[1], extremes[2], listed, gain, reach)
    furthest = _settle_extremes(y, sign, peak, listed, gain, reach, best)
    size = _collect(y, sign, peak, furthest, lead, gaps, tokens)
    _walk_heap(x, w, reach, best, gaps, tokens, size, listed)
    return peak


@njit(cache=True, nogil=True, fastmath=_FAST)
def _scan_rows(y, x, weight, extremes, peaks, best, worker, workers):  # pragma: no cover
    """`_scan` of every ``workers``-th row in both directions. Shapes as in `raise_extremes`."""
    rows, columns = weight.shape
    gaps, tokens = np.empty(y.shape[1], np.float32), np.empty(y.shape[1], np.int32)
    w, gain, reach = np.empty(columns, np.float32), np.empty(columns, np.float32), np.zeros(columns, np.float32)
    listed = np.empty(columns + 1, np.int32)
    for r in range(worker, rows, workers):
        for side in range(2):
            sign = np.float32(1 - 2 * side)
            for i in range(columns):
                w[i] = sign * weight[r, i]
            peaks[side, r] = _scan(
                y[r], sign, x, w, extremes, peaks[side, r], best[side, r], reach, gain, gaps, tokens, listed
            )


def column_extremes(x: Tensor) -> Extremes:
    """The two most extreme entries of every column in either direction.

    Args:
        x: (tokens, in) float32, contiguous, at least one token.
    """
    token = torch.zeros(2, x.shape[1], dtype=torch.int32)
    first, second = (torch.full((2, x.shape[1]), -torch.inf) for _ in range(2))
    _in_threads(_column_extremes, *(a.numpy() for a in (x, token, first, second)))
    return Extremes(token, first, first.clone() if x.shape[0] == 1 else second)


def raise_extremes(y: Tensor, x: Tensor, weight: Tensor, extremes: Extremes, peaks: Tensor, best: Tensor) -> None:
    """Adds a chunk of tokens to the extremes that remain when each weight is removed. All float32, contiguous.

    Args:
        y: (rows, tokens) outputs ``weight @ x.T`` of the chunk.
        x: (tokens, in).
        weight: (rows, in).
        extremes: `column_extremes` of ``x``.
        peaks: (2, rows) running maximum of Y and of −Y; −inf before the first chunk. Updated.
        best: (2, rows, in) running max_t(±(Y_t − X_ti W_i)) minus ``peaks``; −inf before the first chunk. Updated.
    """
    looked_up = tuple(a.numpy() for a in extremes)
    _in_threads(_scan_rows, y.numpy(), x.numpy(), weight.numpy(), looked_up, peaks.numpy(), best.numpy())


def warm_up() -> None:
    """Compiles the kernels, or loads them from numba's cache, so that no timed work pays for it."""
    one = torch.ones(1, 1)
    raise_extremes(one, one, one, column_extremes(one), torch.full((2, 1), -torch.inf), torch.zeros(2, 1, 1))


def _in_threads(kernel: Callable[..., None], *arrays: object) -> None:
    """Runs ``kernel(*arrays, worker, workers)`` in as many threads as torch uses."""
    workers = torch.get_num_threads()
    if workers == 1:
        kernel(*arrays, 0, 1)
        return
    with ThreadPoolExecutor(workers) as pool:
        for share in [pool.submit(kernel, *arrays, worker, workers) for worker in range(workers)]:
            share.result()
