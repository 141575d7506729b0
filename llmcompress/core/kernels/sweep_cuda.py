"""The inner block of the optimal-brain sweep on CUDA, compiled by Triton: the same functions as `sweep_cpu`.

A program holds a tile of rows, transposed, in registers. Column by column it takes its row of the tile, projects it,
and adds the error times a row of V to all columns to come; there is no look back and nothing is read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: most columns per call: their tile must fit into registers
COLUMNS = 128
#: rows per program
ROWS = 16
#: adding and subtracting 1.5 · 2²³ rounds a float32 to the nearest integer, ties to even
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _row(tile, here):
    """The row of a (columns, rows) tile where ``here`` (columns,) is true."""
    return tl.sum(tl.where(here[:, None], tile, 0.0), 0)


@triton.jit
def _free(s, V, j, k, columns):
    """What column j would add to cancel its carried sum, the carried sums after that, and V_jj."""
    here = k == j
    diagonal = tl.load(V + j * columns + j)
    free = -tl.div_rn(_row(s, here), diagonal)
    row = tl.load(V + j * columns + k, mask=k < columns, other=0.0)
    return free, s + row[:, None] * free[None, :], diagonal


@triton.jit
def _choose(kept, w, s, V, first, k, columns, n, M: tl.constexpr):
    """Decides the N:M group that starts at column ``first``: highest w² V_kk²; ties keep the later."""
    score = w * 0.0
    for i in range(M):
        here = k == first + i
        free, s, diagonal = _free(s, V, first + i, k, columns)
        salience = (_row(w, here) + free) * diagonal
        score = tl.where(here[:, None], (salience * salience)[None, :], score)
    inside = (k >= first) & (k < first + M)
    for i in range(M):
        mine = _row(score, k == first + i)[None, :]
        lower = (score < mine) | ((score == mine) & (k < first + i)[:, None])
        below = tl.sum(tl.where(inside[:, None] & lower, 1, 0), 0)
        kept = tl.where((k == first + i)[:, None], (below >= M - n)[None, :].to(tl.int32), kept)
    return kept


@triton.jit
def _sweep(
    weight, values, first, error, carried, V, keep, n, scale, zero, level_of, low, high, rows, width, columns,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    live = (k < columns)[:, None] & (r < rows)[None, :]
    natural = r[None, :].to(tl.int64) * width + first + k[:, None]
    transposed = k[:, None].to(tl.int64) * rows + r[None, :]
    w = tl.load(weight + natural, mask=live, other=0.0)
    s = tl.load(carried + transposed, mask=live, other=0.0)
    q, e = w * 0.0, w * 0.0
    kept = tl.full((COLUMNS, ROWS), 1, tl.int32)
    if MASKED and M == 0:
        kept = tl.load(keep + transposed, mask=live, other=0).to(tl.int32)
    for j in range(columns):
        if M > 0:  # noqa: SIM102, compiled away without a pattern
            if j % M == 0:
                kept = _choose(kept, w, s, V, j, k, columns, n, M)
        here = k == j
        own = _row(w, here)
        free, _, _ = _free(s, V, j, k, columns)
        column = own + free
        if ROUNDED:
            level = tl.load(level_of + j) * rows
            step = tl.load(scale + level + r, mask=r < rows, other=1.0)
            offset = tl.load(zero + level + r, mask=r < rows, other=0.0)
            code = tl.minimum(tl.maximum(tl.div_rn(column, step) + offset, low - 1), high + 1)
            code = (code + ROUNDING) - ROUNDING
            column = (tl.minimum(tl.maximum(code, low), high) - offset) * step
        stays = tl.sum(tl.where(here[:, None], kept, 0), 0) > 0
        column = tl.where(stays, column, 0.0)
        row = tl.load(V + j * columns + k, mask=k < columns, other=0.0)
        s += row[:, None] * (column - own)[None, :]
        q = tl.where(here[:, None], column[None, :], q)
        e = tl.where(here[:, None], (column - own)[None, :], e)
    tl.store(values + natural, q, mask=live)
    tl.store(error + transposed, e, mask=live)
    if M > 0:
        tl.store(keep + transposed, kept.to(tl.int8), mask=live)


@triton.jit
def _adjust(weight, first, carried, V, adjusted, rows, width, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    live = (k < columns)[:, None] & (r < rows)[None, :]
    natural = r[None, :].to(tl.int64) * width + first + k[:, None]
    transposed = k[:, None].to(tl.int64) * rows + r[None, :]
    w = tl.load(weight + natural, mask=live, other=0.0)
    s = tl.load(carried + transposed, mask=live, other=0.0)
    for j in range(columns):
        free, s, _ = _free(s, V, j, k, columns)
        w += tl.where((k == j)[:, None], free[None, :], 0.0)
    tl.store(adjusted + transposed, w, mask=live)


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
) -> None:
    """As `llmcompress.core.kernels.sweep_cpu.sweep_columns`."""
    rows, width = weight.shape
    columns = len(V)
    _sweep[(triton.cdiv(rows, ROWS),)](
        weight, values, first, error, carried, V, keep.view(torch.int8), n, scale, zero, level_of,
        float(codes[0]), float(codes[1]), rows, width, columns,
        COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS, M=m, MASKED=len(keep) > 0, ROUNDED=len(scale) > 0,
    )  # fmt: skip


def adjust_columns(weight: Tensor, first: int, carried: Tensor, V: Tensor, adjusted: Tensor) -> None:
    """As `llmcompress.core.kernels.sweep_cpu.adjust_columns`."""
    rows, width = weight.shape
    columns = len(V)
    _adjust[(triton.cdiv(rows, ROWS),)](
        weight, first, carried, V, adjusted, rows, width, columns,
        COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS,
    )  # fmt: skip
