"""Work shared among plain threads."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest

from llmcompress.core.kernels.threads import share


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("size", "unit"), [(0, 1), (1, 4), (10, 1), (10, 4), (16, 4), (1000, 7)])
def test_every_item_is_done_once_and_units_stay_together(size, unit, threads):
    spans = []
    share(lambda first, last, more: spans.append((first, last, more)), size, unit, threads, "more")
    assert [i for first, last, _ in sorted(spans) for i in range(first, last)] == list(range(size))
    assert all(first % unit == 0 for first, _, _ in spans)
    assert len(spans) <= threads
    assert all(more == "more" for _, _, more in spans)


def test_spans_are_under_way_at_once():
    barrier = threading.Barrier(3, timeout=20)
    share(lambda first, last: barrier.wait(), 3, 1, 3)


def test_an_error_in_another_thread_is_raised():
    def kernel(first, last):
        if first:
            raise FloatingPointError("in a span")

    with pytest.raises(FloatingPointError, match="in a span"):
        share(kernel, 2, 1, 2)


def _child() -> None:
    share(lambda first, last: None, 2, 1, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_a_forked_process_has_threads_of_its_own():
    share(lambda first, last: None, 2, 1, 2)
    child = multiprocessing.get_context("fork").Process(target=_child)
    child.start()
    child.join(20)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0
