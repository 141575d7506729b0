"""Plain threads for compiled kernels that release the interpreter's lock. Not numba's own: those are a second pool,
which would spin beside torch's."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def share(kernel: Callable[..., None], size: int, unit: int, threads: int, *arguments: object) -> None:
    """Runs ``kernel(first, last, *arguments)`` over ``size`` items in equal spans of whole units, one per thread.

    Args:
        kernel: compiled, with the interpreter's lock released.
        size: how many items there are.
        unit: items that stay together.
        threads: at most so many.
    """
    units = -(-size // unit)
    span = -(-units // max(1, min(threads, units))) * unit if units else 1
    spans = [(first, min(first + span, size)) for first in range(0, size, span)]
    others = [_helpers(threads).submit(kernel, *ends, *arguments) for ends in spans[1:]]
    for ends in spans[:1]:
        kernel(*ends, *arguments)
    for other in others:
        other.result()


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work, which costs a call half of what starting them does."""
    return ThreadPoolExecutor(threads - 1, "kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of its parent's threads
