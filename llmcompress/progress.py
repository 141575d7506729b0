"""What a run shows while it works: one bar over blocks on a terminal, one plain line per block elsewhere, nothing
where only the report is wanted."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from llmcompress.report import BlockReport

Advance = Callable[[int], None]


class Progress:
    """Where progress is shown.

    Args:
        stream: standard error if None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = sys.stderr if stream is None else stream

    @classmethod
    def silent(cls) -> Progress:
        """One that shows nothing."""
        progress = cls()
        progress._stream = None
        return progress

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
        """Shows a phase beside the blocks, such as sampling or evaluating.

        Args:
            name: e.g. ``sampling calibration``.
            total: steps in it, None if unknown.
            unit: what a step is.

        Yields:
            A function to call with the number of steps done since its last call.
        """
        began = time.perf_counter()
        with self._bar(total, unit, name) as bar:
            yield lambda steps: _advance(bar, steps)
        self._line(f"{name}: {_seconds(time.perf_counter() - began)}")

    @contextmanager
    def blocks(self, total: int) -> Iterator[BlockProgress]:
        """Shows the walk over ``total`` blocks."""
        with self._bar(total, "block", "") as bar:
            yield BlockProgress(total, bar, self._line)

    @contextmanager
    def _bar(self, total: int | None, unit: str, name: str) -> Iterator[tqdm | None]:
        """A bar on a terminal; None elsewhere. It is closed however the block is left."""
        if self._stream is None or not self._stream.isatty():
            yield None
            return
        with tqdm(total=total, desc=name, unit=unit, file=self._stream, leave=False, dynamic_ncols=True) as bar:
            yield bar

    def _line(self, text: str) -> None:
        if self._stream is not None:
            print(text, file=self._stream, flush=True)


class BlockProgress:
    """Told of matrices and blocks as they are finished.

    Args:
        total: number of blocks.
        bar: to draw on; None to write a line per block.
        line: writes one.
    """

    def __init__(self, total: int, bar: tqdm | None, line: Callable[[str], None]) -> None:
        self._total, self._bar, self._line = total, bar, line
        self._done, self._began = 0, time.perf_counter()

    def matrix(self, name: str, relative_error: float | None) -> None:
        """Tells of a finished matrix, by its dotted name, and of its relative error if that is known."""
        if self._bar is None:
            return
        block, matrix = _split(name)
        self._bar.set_description_str(block, refresh=False)
        self._bar.set_postfix_str(matrix if relative_error is None else f"{matrix} error {relative_error:.1e}")

    def block(self, report: BlockReport) -> None:
        """Tells of a finished block."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        left = (time.perf_counter() - self._began) / self._done * max(0, self._total - self._done)
        errors = {m.name: m.relative_error for m in report.matrices if m.relative_error is not None}
        parts = [f"block {self._done}/{self._total} {_split(report.name)[0]}: {_seconds(report.seconds)}"]
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            parts.append(f"worst {worst.removeprefix(report.name + '.')} error {errors[worst]:.1e}")
        parts.append(f"{report.sparsity:.1%} zeros")
        self._line(", ".join([*parts, f"remaining {_seconds(left)}"]))


def _advance(bar: tqdm | None, steps: int) -> None:
    if bar is not None:
        bar.update(steps)


def _split(name: str) -> tuple[str, str]:
    """``layers.3`` and ``mlp.down_proj`` of ``model.layers.3.mlp.down_proj``: cut after the first number."""
    found = re.match(r"(?:.*?\.)?([^.]+\.\d+)(?:\.(.*))?$", name)
    return (found[1], found[2] or "") if found else (name, name)


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
