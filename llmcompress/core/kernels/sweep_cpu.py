"""The inner block of the optimal-brain sweep on a CPU, compiled by numba.

Rows are independent, so a task is a tile of rows. Everything is stored transposed, (columns, rows): the innermost
loops then run over the rows of a tile, contiguous and of fixed length, and become vector instructions. Errors of a
tile live in a small local buffer: in the matrix itself, consecutive columns lie a power of two apart and would fight
for the same cache lines."""

from __future__ import annotations

import numpy as np
from numba import config as numba_config
from numba import njit, prange, set_num_threads

#: rows per task; a multiple of the widest vector register
TILE = 128
#: tasks of the selection
CHUNKS = 16


def use_threads(count: int) -> None:
    """Runs the kernels on ``count`` threads, as far as numba was started with so many."""
    set_num_threads(max(1, min(count, numba_config.NUMBA_NUM_THREADS)))


@njit(inline="always")
def _carry(total, error, V, first, last, k):
    """total += Σ_{first ≤ i < last} error_i V_ik, eight columns at a time so that ``total`` stays in registers."""
    i = first
    while i + 8 <= last:
        v0, v1, v2, v3 = V[i, k], V[i + 1, k], V[i + 2, k], V[i + 3, k]
        v4, v5, v6, v7 = V[i + 4, k], V[i + 5, k], V[i + 6, k], V[i + 7, k]
        for r in range(TILE):
            near = error[i, r] * v0 + error[i + 1, r] * v1 + error[i + 2, r] * v2 + error[i + 3, r] * v3
            far = error[i + 4, r] * v4 + error[i + 5, r] * v5 + error[i + 6, r] * v6 + error[i + 7, r] * v7
            total[r] += near + far
        i += 8
    while i < last:
        v = V[i, k]
        for r in range(TILE):
            total[r] += error[i, r] * v
        i += 1


@njit(inline="always")
def _load(tile, matrix, start, width):
    for k in range(matrix.shape[0]):
        for r in range(width):
            tile[k, r] = matrix[k, start + r]
        for r in range(width, TILE):
            tile[k, r] = 0


@njit(inline="always")
def _choose(keep, weight, carried, V, free, score, start, n, m):
    """Decides the N:M group of columns ``start`` to ``start + m``: the ``n`` with the highest w² V_kk² stay, where w
    are the weights adjusted for the errors so far and ties go to the later column."""
    for c in range(m):
        k = start + c
        free[c] = carried[k]
        _carry(free[c], free, V[start:], 0, c, k)
        diagonal = V[k, k]
        for r in range(TILE):
            free[c, r] = -free[c, r] / diagonal
            score[c, r] = np.square((weight[k, r] + free[c, r]) * diagonal)
    for c in range(m):
        for r in range(TILE):
            below = 0
            for d in range(m):
                below += (score[d, r] < score[c, r]) | ((score[d, r] == score[c, r]) & (d < c))
            keep[start + c, r] = below >= m - n


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})
def sweep_columns(weight, error, carried, V, keep, n, m, scale, zero, level_of, low, high):
    """Sweeps ``c`` columns given what earlier columns carried over.

    Args:
        weight: (c, rows) float32, overwritten by the projected values.
        error: (c, rows), overwritten by values minus weights.
        carried: (c, rows) Σ E_i V_ik over all earlier columns i.
        V: (c, c) upper triangular block of the factor.
        keep: (c, rows) bool; read if ``m`` is 0, else decided here, ``n`` of every ``m`` columns; no columns if dense.
        n, m: N:M pattern or zeros; ``m`` divides ``c``.
        scale, zero: (levels, rows) of the quantization grid; no levels if values are not rounded.
        level_of: (c,) which level a column uses.
        low, high: lowest and highest code.
    """
    columns, rows = weight.shape
    step = m if m else 1
    masked, rounded = keep.shape[0] > 0, scale.shape[0] > 0
    for tile in prange((rows + TILE - 1) // TILE):
        start = tile * TILE
        width = min(TILE, rows - start)
        w, s, e = np.empty((3, columns, TILE), weight.dtype)
        kept = np.ones((columns, TILE), np.bool_)
        free, score = np.empty((2, step, TILE), weight.dtype)
        step_size, offset = np.ones((2, TILE), weight.dtype)
        _load(w, weight, start, width)
        _load(s, carried, start, width)
        if masked and not m:
            _load(kept, keep, start, width)
        for j in range(0, columns, step):
            for k in range(j, j + step):
                _carry(s[k], e, V, 0, j, k)
            if m:
                _choose(kept, w, s, V, free, score, j, n, m)
            for k in range(j, j + step):
                _carry(s[k], e, V, j, k, k)
                diagonal = V[k, k]
                if rounded:
                    for r in range(width):
                        step_size[r] = scale[level_of[k], start + r]
                        offset[r] = zero[level_of[k], start + r]
                    for r in range(TILE):
                        x = np.rint((w[k, r] - s[k, r] / diagonal) / step_size[r] + offset[r])
                        q = (min(max(x, low), high) - offset[r]) * step_size[r]
                        q = q if kept[k, r] else np.float32(0)
                        e[k, r] = q - w[k, r]
                        w[k, r] = q
                else:
                    for r in range(TILE):
                        q = w[k, r] - s[k, r] / diagonal
                        q = q if kept[k, r] else np.float32(0)
                        e[k, r] = q - w[k, r]
                        w[k, r] = q
        for k in range(columns):
            for r in range(width):
                weight[k, start + r] = w[k, r]
                error[k, start + r] = e[k, r]
                if m:
                    keep[k, start + r] = kept[k, r]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"})
def adjust_columns(weight, carried, V):
    """(c, rows) weights that would cancel what earlier columns carried over: W − S V⁻¹, all (c, rows) but V (c, c)."""
    columns, rows = weight.shape
    adjusted = np.empty_like(weight)
    for tile in prange((rows + TILE - 1) // TILE):
        start = tile * TILE
        width = min(TILE, rows - start)
        e = np.empty((columns, TILE), weight.dtype)
        _load(e, carried, start, width)
        for k in range(columns):
            _carry(e[k], e, V, 0, k, k)
            inverse = -1 / V[k, k]
            for r in range(TILE):
                e[k, r] *= inverse
            for r in range(width):
                adjusted[k, start + r] = weight[k, start + r] + e[k, r]
    return adjusted


@njit(parallel=True, cache=True)
def _histogram(bits, prefix, high_shift, low_shift):
    """Counts of the bits between the shifts, among scores whose higher bits are ``prefix``; (CHUNKS, 2048)."""
    counts = np.zeros((CHUNKS, 2048), np.int64)
    digits = (1 << (high_shift - low_shift)) - 1
    size = (bits.size + CHUNKS - 1) // CHUNKS
    for chunk in prange(CHUNKS):
        for i in range(chunk * size, min(bits.size, (chunk + 1) * size)):
            if bits[i] >> high_shift == prefix:
                counts[chunk, (bits[i] >> low_shift) & digits] += 1
    return counts


@njit(parallel=True, cache=True)
def _above(bits, threshold, ties, keep):
    """keep = bits > threshold; of those equal, each chunk drops its first ``ties[chunk]``."""
    size = (bits.size + CHUNKS - 1) // CHUNKS
    for chunk in prange(CHUNKS):
        left = ties[chunk]
        for i in range(chunk * size, min(bits.size, (chunk + 1) * size)):
            keep[i] = bits[i] > threshold
            if bits[i] == threshold:
                keep[i] = left <= 0
                left -= 1


def keep_highest(score: np.ndarray, drop: int) -> np.ndarray:
    """False for exactly the ``drop`` lowest scores; ties go to the later position.

    A radix selection in three passes: floats that are not negative sort like their bits.

    Args:
        score: float32, not negative, contiguous.
        drop: how many go.

    Returns:
        bool, shaped like ``score``.
    """
    bits = score.reshape(-1).view(np.int32)
    keep = np.ones(bits.shape, np.bool_)
    if drop <= 0:
        return keep.reshape(score.shape)
    prefix, before = 0, 0
    for high_shift, low_shift in ((31, 20), (20, 9), (9, 0)):
        counts = _histogram(bits, prefix, high_shift, low_shift)
        reached = before + np.cumsum(counts.sum(0))
        bucket = int(np.searchsorted(reached, drop))
        before = int(reached[bucket - 1]) if bucket else before
        prefix = (prefix << (high_shift - low_shift)) | bucket
    equal = counts[:, bucket]
    earlier = np.cumsum(equal) - equal
    _above(bits, prefix, np.clip(drop - before - earlier, 0, equal), keep)
    return keep.reshape(score.shape)
