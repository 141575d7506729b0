"""Plain threads for compiled kernels that release the interpreter's lock. Not numba's own: those are a second pool,
which would spin beside torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
    others = [threading.Thread(target=kernel, args=(*ends, *arguments)) for ends in spans[1:]]
    for thread in others:
        thread.start()
    for ends in spans[:1]:
        kernel(*ends, *arguments)
    for thread in others:
        thread.join()
