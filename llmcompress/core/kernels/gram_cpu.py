"""Gram matrices of bfloat16 rows on CPUs that multiply pairs of them in one instruction (AVX512-BF16), by numba.

Products of bfloat16 values are exact in float32, and sums are float32, so the result is that of a float32 product at
bfloat16's speed. torch has none that keeps float32 sums. The rows of two tokens lie side by side in a word, 32 columns
to a panel; a tile of the matrix, 8 rows by a panel, is kept in registers over all pairs of a piece of the rows, and
only tiles of the upper triangle are computed. Every tile is one thread's: any number of threads gives the same sums."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from llmcompress.core.kernels.threads import share
from llmcompress.core.kernels.vectors import ADDRESS, WORD, everywhere, host_has, load, pointer

#: columns of a panel: two registers of 16 sums
PANEL = 32
#: rows of a tile: 16 registers of sums, which hides how long a product takes
TILE = 8
#: pairs of tokens of a piece: a panel of them, 64 KiB, stays in the second cache
PAIRS = 512
#: columns from which this is faster than what it replaces
LEAST_WIDTH = 256


class _BFloat(ir.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_WORDS, _PAIRS, _SUMS = ir.VectorType(WORD, 16), ir.VectorType(_BFloat(), 32), ir.VectorType(ir.FloatType(), 16)


def multiplies(x: Tensor) -> bool:
    """Whether rows ``x`` (tokens, in) can be taken here."""
    fits = x.shape[1] % PANEL == 0 and x.shape[1] >= LEAST_WIDTH
    return fits and x.dtype == torch.bfloat16 and x.device.type == "cpu" and host_has("avx512bf16")


def add_gram(total: Tensor, x: Tensor) -> None:
    """``total += xᵀx`` in panels on and above the diagonal, which is more than the upper triangle.

    Args:
        total: (in, in) float32, contiguous.
        x: (tokens, in) bfloat16 for which `multiplies` is true.
    """
    panels, threads = x.shape[1] // PANEL, torch.get_num_threads()
    for rows in x.split(2 * PAIRS):
        if len(rows) % 2:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        pairs = torch.empty(panels, len(rows) // 2, PANEL, dtype=torch.uint32).numpy()  # starts at a cache line
        share(_pair, panels, 1, threads, rows.contiguous().view(torch.uint16).numpy(), pairs)
        share(_add_panels, panels, 2, threads, pairs, total.numpy())


@njit(nogil=True, cache=True)
def _pair(begin, end, bits, pairs):  # pragma: no cover (compiled)
    """Panels [begin, end) of rows as bits, (tokens, in) uint16, to (panels, tokens / 2, PANEL) words."""
    for p in range(begin, end):
        for k in range(pairs.shape[1]):
            low, high = bits[2 * k, p * PANEL : (p + 1) * PANEL], bits[2 * k + 1, p * PANEL : (p + 1) * PANEL]
            to = pairs[p, k]
            for j in range(PANEL):
                to[j] = np.uint32(low[j]) | (np.uint32(high[j]) << np.uint32(16))


@njit(nogil=True, cache=True)
def _add_panels(begin, end, pairs, total):  # pragma: no cover (compiled)
    """All tiles above some panels of the diagonal: long and short columns of them in turn, so that shares are equal."""
    panels, count = pairs.shape[0], pairs.shape[1]
    of_panel, of_row = 4 * PANEL * count, 4 * total.shape[1]
    for turn in range(begin, end):
        j = turn // 2 if turn % 2 == 0 else panels - 1 - turn // 2
        right = pairs.ctypes.data + j * of_panel
        for i in range(j + 1):
            for r in range(0, PANEL, TILE):
                left = pairs.ctypes.data + i * of_panel + 4 * r
                tile = total.ctypes.data + (i * PANEL + r) * of_row + 4 * PANEL * j
                _add_tile(left, right, tile, of_row, count)


@intrinsic
def _add_tile(typing_context, left, right, tile, of_row, count):
    """``tile[r, c] += Σ_k left[k, r] · right[k, c]`` over ``count`` > 0 words, each a sum of two products.

    All but the count are addresses, and ``of_row`` the bytes from one row of the tile to the next."""

    def generate(context, builder, signature, arguments):
        left, right, tile, of_row, count = arguments
        spot = "llvm.x86.avx512bf16.dpbf16ps.512"
        product = builder.module.declare_intrinsic(spot, (), ir.FunctionType(_SUMS, (_SUMS, _PAIRS, _PAIRS)))
        places = [(r, half) for r in range(TILE) for half in range(2)]
        entry, loop, after = builder.block, *map(builder.append_basic_block, ("pairs", "after"))
        builder.branch(loop)

        builder.position_at_end(loop)
        k, sums = builder.phi(ADDRESS), {place: builder.phi(_SUMS) for place in places}
        offset = builder.mul(k, ADDRESS(4 * PANEL))
        columns = [load(builder, right, offset, 64 * half, _WORDS) for half in range(2)]
        rows = [everywhere(builder, load(builder, left, offset, 4 * r, WORD), 16) for r in range(TILE)]
        new = {
            (r, half): builder.call(
                product, (sums[r, half], builder.bitcast(rows[r], _PAIRS), builder.bitcast(columns[half], _PAIRS))
            )
            for r, half in places
        }
        following = builder.add(k, ADDRESS(1))
        for phi, first, value in [(k, ADDRESS(0), following)] + [
            (sums[p], ir.Constant(_SUMS, [0.0] * 16), new[p]) for p in places
        ]:
            phi.add_incoming(first, entry)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)

        builder.position_at_end(after)
        for r, half in places:
            offset = builder.mul(of_row, ADDRESS(r))
            whole = builder.fadd(load(builder, tile, offset, 64 * half, _SUMS), new[r, half])
            builder.store(whole, pointer(builder, tile, offset, 64 * half, _SUMS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), generate
