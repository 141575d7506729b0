"""What the program sets in its process before libraries are loaded.

Threads wait for work asleep. Spinning ones slow down tenfold where cores are shared with other programs, and take them
from the kernels that run between two products, torch's or LAPACK's.

Threads share one heap, where compression runs: the forwards of a walk are threads that take turns, and each would fetch
from the system, page by page, what another has just freed."""

from __future__ import annotations

import ctypes
import os
import sys

#: environment variables, to be set before numpy, scipy and torch are loaded: of OpenMP, and of OpenBLAS, whose threads
#: then spin for 2^14 cycles instead of 2^26
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "14"}
#: glibc's number of a parameter, and its value, by the environment variable that sets it too: one heap, from which
#: tensors of up to 32 MiB are taken, and which shrinks when `llmcompress.measure.release_freed_memory` is called.
#: Larger ones would leave holes in it
_HEAP = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1),
}


def share_heap() -> None:
    """Has all threads share one heap (glibc; elsewhere nothing is done), to be called before any is started. What the
    environment says of the heap stays as it is."""
    set_parameter = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, (parameter, value) in _HEAP.items():
        if set_parameter is not None and variable not in os.environ:
            set_parameter(parameter, value)
