"""What a run shows while it works: one bar over blocks on a terminal, one plain line per block elsewhere, nothing
where only the report is wanted."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

Advance = Callable[[int], None]


class Progress:
    """Told of phases, blocks and matrices as they come; decides how to show them.

    Used as a context manager, so that the bar is closed when a run fails.

    Args:
        total_blocks: how many blocks will come; may be set later, before the first of them.
        stream: where to write; standard error if None.
        silent: show nothing, for ``--json``.
    """

    def __init__(self, total_blocks: int = 0, stream: TextIO | None = None, silent: bool = False) -> None:
        self.total_blocks = total_blocks
        self._stream = sys.stderr if stream is None else stream
        self._silent = silent
        self._terminal = not silent and self._stream.isatty()
        self._bar: tqdm | None = None
        self._done = 0
        self._before = 0  # blocks of these that an earlier process did
        self._started = self._block_started = 0.0
        self._block = ""
        self._worst: tuple[str, float] | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "step") -> Iterator[Advance]:
        """Shows a phase beside the blocks, such as sampling or evaluating.

        Args:
            name: e.g. ``sampling the model``.
            total: steps in it, None if unknown.
            unit: what a step is.

        Yields:
            A function to call with the number of steps done since its last call.
        """
        self._close_bar()
        began = time.perf_counter()
        if self._terminal:
            with tqdm(total=total, desc=name, unit=unit, file=self._stream, leave=False, dynamic_ncols=True) as bar:
                self._bar = bar
                try:
                    yield lambda steps: _advance(bar, steps)
                finally:
                    self._bar = None
        else:
            yield lambda steps: None
        self._line(f"{name}: {seconds_text(time.perf_counter() - began)}")

    def skip_blocks(self, number: int) -> None:
        """So many blocks are done already when the first one begins."""
        self._done = self._before = number

    def begin_block(self, name: str) -> None:
        """Enters a block, e.g. ``model.layers.3``."""
        self._block_started = time.perf_counter()
        self._block, self._worst = name, None
        if self._done == self._before:
            self._started = self._block_started
        if self._terminal and self._bar is None:
            self._bar = tqdm(
                total=self.total_blocks, initial=self._done, unit="block", file=self._stream, dynamic_ncols=True
            )
        if self._bar is not None:
            self._bar.set_description_str(_short(name))

    def matrix(self, name: str, relative_error: float | None) -> None:
        """Tells of a finished matrix of the block, by its dotted name, and of its relative error if that is known."""
        name = name.removeprefix(self._block + ".")
        if relative_error is not None and (self._worst is None or not relative_error <= self._worst[1]):
            self._worst = name, relative_error
        if self._bar is not None:
            self._bar.set_postfix_str(name if relative_error is None else f"{name} {relative_error:.1e}")

    def note(self, text: str) -> None:
        """Tells how far the work on the block is, beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """Tells something on a line of its own, between phases."""
        self._close_bar()
        self._line(text)

    def step(self, text: str) -> None:
        """Tells of a long step of a phase: beside its bar, or on a line of its own where there is none."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self._line(text)

    def end_block(self, zeros: float) -> None:
        """Leaves the block. ``zeros`` is the share of zeros in its compressed matrices."""
        now = time.perf_counter()
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            if self._done >= self.total_blocks:
                self._close_bar()
            return
        left = (now - self._started) / (self._done - self._before) * max(0, self.total_blocks - self._done)
        worst = f"worst {self._worst[0]} error {self._worst[1]:.1e}, " if self._worst else ""
        self._line(
            f"block {self._done}/{self.total_blocks} {_short(self._block)}: {seconds_text(now - self._block_started)}, "
            f"{worst}{zeros:.1%} zeros, remaining {seconds_text(left)}"
        )

    def _line(self, text: str) -> None:
        if not self._silent:
            print(text, file=self._stream, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _advance(bar: tqdm, steps: int) -> None:
    bar.update(steps)


def _short(block: str) -> str:
    """The end of a block's name: ``layers.3`` of ``model.layers.3``."""
    found = re.search(r"[^.]+\.\d+$", block)
    return found[0] if found else block


def seconds_text(value: float) -> str:
    """``9.5 s``, ``12 s``, ``2.5 min``, ``13 min`` or ``2.1 h``."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.1f} min" if value < 600 else f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"
