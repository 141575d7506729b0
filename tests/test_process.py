"""What the program sets in its process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from llmcompress.commands import compress
from llmcompress.process import share_heap

#: allocates 16 MiB in a thread, and says whether they are of the heap that the process began with
SCRIPT = """
import re, threading
from pathlib import Path
from llmcompress.process import share_heap
{call}
import torch
def allocate():
    tensor = torch.empty(16 << 20, dtype=torch.uint8)
    heap = re.search(r"^([0-9a-f]+)-([0-9a-f]+) .*\\[heap\\]$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    print(int(heap[1], 16) <= tensor.data_ptr() < int(heap[2], 16))
thread = threading.Thread(target=allocate)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
@pytest.mark.parametrize(
    ("call", "environment", "shared"),
    [("", {}, False), ("share_heap()", {}, True), ("share_heap()", {"MALLOC_MMAP_THRESHOLD_": "131072"}, False)],
)
def test_tensors_of_all_threads_come_from_one_heap_unless_told_otherwise(
    call: str, environment: dict[str, str], shared: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(call=call)], env=os.environ | environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(shared)


def test_where_the_c_library_cannot_be_told_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    share_heap()
    monkeypatch.setattr("sys.platform", "win32")
    share_heap()


def test_a_compression_runs_on_one_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(Exception):
        pass

    def noted() -> None:
        raise Shared

    monkeypatch.setattr(compress, "share_heap", noted)
    with pytest.raises(Shared):
        compress.run(["--model", "llama"])
