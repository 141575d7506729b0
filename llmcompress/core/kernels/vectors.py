"""Pieces of LLVM code for kernels that hold sums in vector registers, which numba cannot be told to."""

from __future__ import annotations

from functools import cache

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

WORD, ADDRESS, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


@cache
def host_has(feature: str) -> bool:
    """Whether kernels may use an instruction set: not so if numba was told to compile for another processor, or not to
    compile."""
    told = config.CPU_NAME or config.CPU_FEATURES or config.DISABLE_JIT
    return not told and bool(llvmlite.binding.get_host_cpu_features().get(feature))


#: float32 values of a register
LANES = 16 if host_has("avx512f") else 8
FLOATS = ir.VectorType(FLOAT, LANES)


@intrinsic
def transpose(typing_context, source, of_source, target, of_target):
    """Writes the LANES x LANES float32 values at one address to another, rows as columns; ``of_source`` and
    ``of_target`` are the bytes from one row to the next."""

    def generate(context, builder, signature, arguments):
        source, of_source, target, of_target = arguments
        halves = [
            ir.Constant(ir.VectorType(WORD, LANES), [i // 2 + first + i % 2 * LANES for i in range(LANES)])
            for first in (0, LANES // 2)
        ]
        rows = [load(builder, source, builder.mul(of_source, ADDRESS(r)), 0, FLOATS) for r in range(LANES)]
        for _ in range(LANES.bit_length() - 1):  # each round riffles one half of the rows into the other
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for r, row in enumerate(rows):
            builder.store(row, pointer(builder, target, builder.mul(of_target, ADDRESS(r)), 0, FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def load(builder, address, offset, more, kind, align=4):
    """The value of a kind that lies ``offset + more`` bytes behind an address."""
    return builder.load(pointer(builder, address, offset, more, kind), align=align)


def pointer(builder, address, offset, more, kind):
    """Where that is."""
    return builder.inttoptr(builder.add(builder.add(address, offset), ADDRESS(more)), kind.as_pointer())


def everywhere(builder, value, lanes):
    """A vector with the value in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, WORD(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(WORD, lanes), None))
