"""The inner block of the optimal-brain sweep on a CPU, compiled by numba.

Rows are independent, so a task is a tile of rows. Tiles are held transposed, (columns, rows): the innermost loops
then run over rows, contiguous and of fixed number, and become vector instructions. They are small local copies: in
the matrices themselves, consecutive columns lie a power of two apart and would fight for the same cache lines.
What earlier columns carry over is summed up for a panel of columns at a time, in registers."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from llmcompress.core.kernels.threads import share
from llmcompress.core.kernels.vectors import ADDRESS, FLOAT, FLOATS, LANES, everywhere, load, pointer, transpose

#: most columns per call: more and a tile's share of the factor leaves the cache
COLUMNS = 256
#: rows per tile; a multiple of the widest vector register
TILE = 128
#: columns of a panel: as many sums are under way at once, which hides how long one takes
PANEL = 8
#: multiplications and additions may be fused; nothing else is loosened
FAST = {"contract", "nsz"}
_NONE = torch.empty(0)


@intrinsic
def _add_products(typing_context, total, error, V, of_row, count):
    """``total[k] += Σ_i error[i] · V[i, k]`` for the PANEL columns k and ``count`` > 0 earlier columns i.

    All but the count are addresses, of rows of a tile and of the panel in V, and ``of_row`` the bytes from one row of V
    to the next."""

    def generate(context, builder, signature, arguments):
        total, error, V, of_row, count = arguments
        entry, begin, loop, end, after = (
            builder.block, *map(builder.append_basic_block, ("begin", "columns", "end", "after"))
        )  # fmt: skip
        builder.branch(begin)

        builder.position_at_end(begin)
        r = builder.phi(ADDRESS)
        old = [load(builder, total, r, 4 * TILE * k, FLOATS, align=4 * LANES) for k in range(PANEL)]
        builder.branch(loop)

        builder.position_at_end(loop)
        i, sums = builder.phi(ADDRESS), [builder.phi(FLOATS) for _ in range(PANEL)]
        here = builder.add(builder.mul(i, ADDRESS(4 * TILE)), r)
        errors, row = load(builder, error, here, 0, FLOATS, align=4 * LANES), builder.mul(i, of_row)
        factors = [everywhere(builder, load(builder, V, row, 4 * k, FLOAT), LANES) for k in range(PANEL)]
        products = [builder.fmul(errors, factor, flags=("contract",)) for factor in factors]
        new = [builder.fadd(*pair, flags=("contract",)) for pair in zip(products, sums, strict=True)]
        following = builder.add(i, ADDRESS(1))
        for phi, first, value in [(i, ADDRESS(0), following), *zip(sums, old, new, strict=True)]:
            phi.add_incoming(first, begin)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, end)

        builder.position_at_end(end)
        for k in range(PANEL):
            builder.store(new[k], pointer(builder, total, r, 4 * TILE * k, FLOATS), align=4 * LANES)
        r.add_incoming(ADDRESS(0), entry)
        r.add_incoming(rows_done := builder.add(r, ADDRESS(4 * LANES)), end)
        builder.cbranch(builder.icmp_signed("<", rows_done, ADDRESS(4 * TILE)), begin, after)

        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), generate


@njit(fastmath=FAST)
def _carry_panel(total, error, V, first, last):
    """total[k] += Σ_{i < first} error_i V_ik for the columns from ``first`` to ``last``."""
    whole = last - (last - first) % PANEL if first else first
    for k in range(first, whole, PANEL):
        factors = V.ctypes.data + 4 * k
        _add_products(total.ctypes.data + 4 * TILE * k, error.ctypes.data, factors, 4 * V.shape[1], first)
    for k in range(whole, last):
        _carry(total[k], error, V, 0, first, k)


@njit(fastmath=FAST)
def _carry(total, error, V, first, last, k):
    """total += Σ_{first ≤ i < last} error_i V_ik, for few columns."""
    for i in range(first, last):
        e, v = error[i], V[i, k]
        for r in range(TILE):
            total[r] += e[r] * v


@njit(fastmath=FAST)
def _tile(columns):
    """(columns, TILE) float32 that starts at a cache line, not yet filled."""
    whole = np.empty(columns * TILE + 16, np.float32)
    skip = (-(whole.ctypes.data // 4)) % 16
    return whole[skip : skip + columns * TILE].reshape(columns, TILE)


@njit(fastmath=FAST)
def _load_rows(tile, matrix, start, width, first):
    """tile (columns, TILE) from rows ``start`` … of a row-major matrix, columns ``first`` …"""
    columns, of_row = tile.shape[0], 4 * matrix.shape[1]
    rows, full = width // LANES * LANES, columns // LANES * LANES
    source = matrix.ctypes.data + start * of_row + 4 * first
    for r in range(0, rows, LANES):
        for k in range(0, full, LANES):
            transpose(source + r * of_row + 4 * k, of_row, tile.ctypes.data + 4 * (k * TILE + r), 4 * TILE)
    for k in range(columns):
        for r in range(rows if k < full else 0, width):
            tile[k, r] = matrix[start + r, first + k]
        for r in range(width, TILE):
            tile[k, r] = 0


@njit(fastmath=FAST)
def _load(tile, matrix, start, width):
    """tile (columns, TILE) from columns ``start`` … of a transposed matrix."""
    for k in range(matrix.shape[0]):
        row = matrix[k, start : start + width]
        for r in range(width):
            tile[k, r] = row[r]
        for r in range(width, TILE):
            tile[k, r] = 0


@njit(fastmath=FAST)
def _store_rows(matrix, tile, start, width, first):
    """The inverse of `_load_rows`."""
    columns, of_row = tile.shape[0], 4 * matrix.shape[1]
    rows, full = width // LANES * LANES, columns // LANES * LANES
    target = matrix.ctypes.data + start * of_row + 4 * first
    for r in range(0, rows, LANES):
        for k in range(0, full, LANES):
            transpose(tile.ctypes.data + 4 * (k * TILE + r), 4 * TILE, target + r * of_row + 4 * k, of_row)
    for k in range(columns):
        for r in range(rows if k < full else 0, width):
            matrix[start + r, first + k] = tile[k, r]


@njit(fastmath=FAST)
def _store(matrix, tile, start, width):
    """The inverse of `_load`."""
    for k in range(tile.shape[0]):
        row = matrix[k, start : start + width]
        for r in range(width):
            row[r] = tile[k, r]


@njit(fastmath=FAST)
def _choose(keep, weight, carried, V, free, score, below, start, n, m):
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
            below[c, r] = 0
        for d in range(c):
            for r in range(TILE):
                later_wins = np.float32(score[d, r] <= score[c, r])
                below[c, r] += later_wins
                below[d, r] += 1 - later_wins
    for c in range(m):
        for r in range(TILE):
            keep[start + c, r] = below[c, r] >= m - n


@njit(fastmath=FAST)
def _sweep_tile(w, s, e, kept, V, n, m, scale, zero, level_of, low, high, middles, values, start, width):
    """Sweeps one tile, all (columns, TILE): ``w`` becomes the values, ``e`` the errors; ``s`` is what was carried."""
    columns = len(V)
    step = m if m else 1
    panel = -(-PANEL // step) * step
    free, score, below = _tile(step), _tile(step), _tile(step)
    step_size, offset = np.ones(TILE, w.dtype), np.zeros(TILE, w.dtype)
    rounded = len(scale) > 0
    for j in range(0, columns, step):
        p = j // panel * panel
        if j == p:
            _carry_panel(s, e, V, p, min(p + panel, columns))
        for k in range(j, j + step):
            _carry(s[k], e, V, p, j, k)
        if m:
            _choose(kept, w, s, V, free, score, below, j, n, m)
        for k in range(j, j + step):
            _carry(s[k], e, V, j, k, k)
            diagonal = V[k, k]
            if rounded:
                steps, zeros = scale[level_of[k], start : start + width], zero[level_of[k], start : start + width]
                for r in range(width):
                    step_size[r], offset[r] = steps[r], zeros[r]
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
    w, s, e = _tile(columns), _tile(columns), _tile(columns)
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
        p = k // PANEL * PANEL
        if k == p:
            _carry_panel(s, s, V, p, min(p + PANEL, len(V)))
        _carry(s[k], s, V, p, k, k)
        inverse = -1 / V[k, k]
        for r in range(TILE):
            s[k, r] *= inverse
            w[k, r] += s[k, r]


@njit(nogil=True, cache=True, fastmath=FAST)
def _adjust_rows(begin, end, weight, first, carried, V, adjusted):
    w, s = _tile(len(V)), _tile(len(V))
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
