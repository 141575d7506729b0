"""What a run costs: seconds by phase, the highest memory, and the versions its numbers hang on."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

_C_LIBRARY = None if sys.platform == "win32" else ctypes.CDLL(None)
#: of /proc/self/smaps: private mappings of files that are not written to, each with its figures
_MAPPING = re.compile(
    r"^(?P<first>[0-9a-f]+)-(?P<last>[0-9a-f]+) r-[x-]p \S+ \S+ \d+ +/.*\n(?P<figures>(?:\w+:.*\n)+)", re.MULTILINE
)
_PACKAGES = ("llmcompress", "torch", "transformers", "compressed-tensors", "safetensors", "numba", "numpy", "scipy")


class Phases:
    """Wall clock by phase. A phase inside another interrupts it, so that no second is counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._switched = time.perf_counter()
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time until the block is left as ``name``."""
        self._switch()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def add_earlier(self, seconds: Mapping[str, float], total: float) -> None:
        """Counts in what a run took before it was interrupted."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self._began -= total

    @property
    def total(self) -> float:
        """Seconds since this was made, in a phase or not."""
        return time.perf_counter() - self._began

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._switched
        self._switched = now


def peak_memory_bytes(device: str = "cpu") -> int | None:
    """The highest memory so far: of the process's pages (CPU), or of the tensors on a CUDA device.

    None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also remember the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spare_memory_bytes(device: str = "cpu") -> int | None:
    """What could still be taken: of the system's memory (Linux), or of a CUDA device's. None where nothing tells."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if table.is_file() else None
    return int(found[1]) * 1024 if found else None


def release_freed_memory() -> None:
    """Gives freed memory back to the system where the C library keeps it for itself otherwise (glibc)."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_mapped(tensor: Tensor) -> None:
    """Takes a tensor's pages out of memory; they come back from the file it is mapped from, without any changes."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    _forget(-(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE)


def release_file_pages() -> None:
    """Takes out of memory what is mapped from files and was not changed: mostly code of libraries that importing and
    loading went through and running does not. What is used again comes back from the system's cache (Linux)."""
    table = Path("/proc/self/smaps")
    for mapping in _MAPPING.finditer(table.read_text()) if table.is_file() else ():
        if re.search(r"^Anonymous: +0 kB", mapping["figures"], re.MULTILINE):
            _forget(int(mapping["first"], 16), int(mapping["last"], 16))


def _forget(first: int, last: int) -> None:
    """MADV_DONTNEED for the pages between two addresses."""
    madvise = getattr(_C_LIBRARY, "madvise", None)
    if madvise is not None and sys.platform == "linux" and last > first:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
