"""The inner block of the optimal-brain sweep on a CPU, compiled by numba.

Rows are independent, so a task is a tile of rows. Tiles are held transposed, (columns, rows): the innermost loops
then run over rows, contiguous and of fixed number, and become vector instructions. They are small local copies: in
the matrices themselves, consecutive columns lie a power of two apart and would fight for the same cache lines."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llmcompress.core.kernels.threads import share

#: most columns per call: more and a tile's share of the factor leaves the cache
COLUMNS = 256
#: rows per tile; a multiple of the widest vector register
TILE = 128
#: multiplications and additions may be fused; nothing else is loosened
FAST = {"contract", "nsz"}
_NONE = torch.empty(0)


@njit(fastmath=FAST)
def _carry(total, error, V, first, last, k):
    """total += Σ_{first ≤ i < last} error_i V_ik, eight columns at a time so that ``total`` stays in registers."""
    tail = last - (last - first) % 8
    for i in range(first, tail, 8):
        e0, e1, e2, e3 = error[i], error[i + 1], error[i + 2], error[i + 3]
        e4, e5, e6, e7 = error[i + 4], error[i + 5], error[i + 6], error[i + 7]
        v0, v1, v2, v3 = V[i, k], V[i + 1, k], V[i + 2, k], V[i + 3, k]
        v4, v5, v6, v7 = V[i + 4, k], V[i + 5, k], V[i + 6, k], V[i + 7, k]
        for r in range(TILE):
            near = e0[r] * v0 + e1[r] * v1 + e2[r] * v2 + e3[r] * v3
            total[r] += near + (e4[r] * v4 + e5[r] * v5 + e6[r] * v6 + e7[r] * v7)
    for i in range(tail, last):
        e0, v0 = error[i], V[i, k]
        for r in range(TILE):
            total[r] += e0[r] * v0


@njit(fastmath=FAST)
def _load_rows(tile, matrix, start, width, first):
    """tile (columns, TILE) from rows ``start`` … of a row-major matrix, columns ``first`` …"""
    for r in range(width):
        for k in range(tile.shape[0]):
            tile[k, r] = matrix[start + r, first + k]
    for k in range(tile.shape[0]):
        for r in range(width, TILE):
            tile[k, r] = 0


@njit(fastmath=FAST)
def _load(tile, matrix, start, width):
    """tile (columns, TILE) from columns ``start`` … of a transposed matrix."""
    for k in range(matrix.shape[0]):
        for r in range(width):
            tile[k, r] = matrix[k, start + r]
        for r in range(width, TILE):
            tile[k, r] = 0


@njit(fastmath=FAST)
def _store_rows(matrix, tile, start, width, first):
    """The inverse of `_load_rows`."""
    for r in range(width):
        for k in range(tile.shape[0]):
            matrix[start + r, first + k] = tile[k, r]


@njit(fastmath=FAST)
def _store(matrix, tile, start, width):
    """The inverse of `_load`."""
    for k in range(tile.shape[0]):
        for r in range(width):
            matrix[k, start + r] = tile[k, r]


@njit(fastmath=FAST)
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


@njit(fastmath=FAST)
def _sweep_tile(w, s, e, kept, V, n, m, scale, zero, level_of, low, high, middles, values, start, width):
    """Sweeps one tile, all (columns, TILE): ``w`` becomes the values, ``e`` the errors; ``s`` is what was carried."""
    columns = len(V)
    step = m if m else 1
    free, score = np.empty((step, TILE), w.dtype), np.empty((step, TILE), w.dtype)
    step_size, offset = np.ones(TILE, w.dtype), np.zeros(TILE, w.dtype)
    rounded = len(scale) > 0
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
                if len(values):
                    for r in range(width):
                        x = (w[k, r] - s[k, r] / diagonal) / step_size[r]
                        s[k, r] = values[np.searchsorted(middles, x)] * step_size[r]
                else:
                    for r in range(TILE):
                        x = np.rint((w[k, r] - s[k, r] / diagonal) / step_size[r] + offset[r])
                        s[k, r] = (min(max(x, low), high) - offset[r]) * step_size[r]
            else:
                for r in range(TILE):
                    s[k, r] = w[k, r] - s[k, r] / diagonal
            for r in range(TILE):
                q = s[k, r] if kept[k, r] else np.float32(0)
                e[k, r] = q - w[k, r]
                w[k, r] = q


@njit(nogil=True, cache=True, fastmath=FAST)
def _sweep_rows(
    begin, end, weight, values, first, error, carried, V, keep, n, m, scale, zero, level_of, low, high, middles, table
):  # fmt: skip
    columns = len(V)
    w = np.empty((columns, TILE), weight.dtype)
    s, e = np.empty_like(w), np.empty_like(w)
    kept = np.ones((columns, TILE), np.bool_)
    for start in range(begin, end, TILE):
        width = min(TILE, end - start)
        _load_rows(w, weight, start, width, first)
        _load(s, carried, start, width)
        if len(keep) and not m:
            _load(kept, keep, start, width)
        _sweep_tile(w, s, e, kept, V, n, m, scale, zero, level_of, low, high, middles, table, start, width)
        _store_rows(values, w, start, width, first)
        _store(error, e, start, width)
        if m:
            _store(keep, kept, start, width)


def sweep_columns(
    weight: Tensor,
    values: Tensor,
    first: int,
    error: Tensor,
    carried: Tensor,
    V: Tensor,
    keep: Tensor,
    n: int,
    m: int,
    scale: Tensor,
    zero: Tensor,
    level_of: Tensor,
    codes: tuple[int, int],
    table: tuple[Tensor, Tensor] = (_NONE, _NONE),
) -> None:
    """Sweeps columns ``first`` to ``first + c`` given what earlier columns carried over.

    Args:
        weight: (rows, in) float32.
        values: (rows, in), its columns overwritten by the projected weights; may be ``weight`` itself.
        error: (c, rows), overwritten by values minus weights.
        carried: (c, rows) Σ E_i V_ik over all earlier columns i.
        V: (c, c) upper triangular block of the factor.
        keep: (c, rows) bool; read if ``m`` is 0, else decided here, ``n`` of every ``m`` columns; no columns if dense.
        n, m: N:M pattern or zeros; ``m`` divides ``c``.
        scale, zero: (levels, rows) of the quantization grid; no levels if values are not rounded.
        level_of: (c,) which level a column uses.
        codes: lowest and highest, of integers.
        table: (K - 1,) middles and (K,) values of another grid.
    """
    into = (weight.numpy(), values.numpy(), first, error.numpy(), carried.numpy(), V.numpy(), keep.numpy(), n, m)
    grid = (scale.numpy(), zero.numpy(), level_of.numpy(), np.float32(codes[0]), np.float32(codes[1]))
    levels = (table[0].numpy(), table[1].numpy())
    share(_sweep_rows, len(weight), TILE, torch.get_num_threads(), *into, *grid, *levels)


@njit(fastmath=FAST)
def _adjust_tile(w, s, V):
    """w − s V⁻¹ of one tile, both (columns, TILE), in place."""
    for k in range(len(V)):
        _carry(s[k], s, V, 0, k, k)
        inverse = -1 / V[k, k]
        for r in range(TILE):
            s[k, r] *= inverse
            w[k, r] += s[k, r]


@njit(nogil=True, cache=True, fastmath=FAST)
def _adjust_rows(begin, end, weight, first, carried, V, adjusted):
    w = np.empty((len(V), TILE), weight.dtype)
    s = np.empty_like(w)
    for start in range(begin, end, TILE):
        width = min(TILE, end - start)
        _load_rows(w, weight, start, width, first)
        _load(s, carried, start, width)
        _adjust_tile(w, s, V)
        _store(adjusted, w, start, width)


def adjust_columns(weight: Tensor, first: int, carried: Tensor, V: Tensor, adjusted: Tensor) -> None:
    """Weights that would cancel what earlier columns carried over, W − S V⁻¹.

    Args:
        weight: (rows, in) float32.
        first: the first of ``c`` columns.
        carried: (c, rows) S.
        V: (c, c) upper triangular block of the factor.
        adjusted: (c, rows) the result.
    """
    arguments = (weight.numpy(), first, carried.numpy(), V.numpy(), adjusted.numpy())
    share(_adjust_rows, len(weight), TILE, torch.get_num_threads(), *arguments)
