"""Runs that are killed: in a process of their own, by SIGKILL, after some seconds or at one of the calls by which they
change what is on disk. Processes are forked from one that has only imported the package, so that each starts at once
and no thread is torn from its pool."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from llmcompress import api, cli
from llmcompress.export import checkpoint
from llmcompress.recipe import Recipe

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.killing"])


def run(
    arguments: tuple[Path, Recipe, Path, api.Options], *, at: int = 0, after: float | None = None, **given: Any
) -> int:
    """One run of `api.compress`; its exit code, which is -9 if it was killed.

    Args:
        arguments: of compress.
        at: die at this change of the disk, counted from 1; 0 for none.
        after: die after so many seconds.
        given: to compress, besides.
    """
    process = _SERVER.Process(target=_compress, args=(arguments, at, given))
    process.start()
    process.join(after)
    if after is not None and process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def changes(arguments: tuple[Path, Recipe, Path, api.Options]) -> int:
    """How many changes of the disk a whole run makes."""
    counted, results = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_count, args=(arguments, results))
    process.start()
    number = int(counted.recv())
    process.join()
    return number


def command(line: Sequence[str], said: Path, *, at: int, signal_number: int = signal.SIGINT) -> int:
    """The command line in a process that gets a signal at a change of the disk; its exit code.

    Args:
        line: the arguments.
        said: file for standard error.
        at: as in `run`.
        signal_number: the signal.
    """
    process = _SERVER.Process(target=_command, args=(list(line), said, at, signal_number))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _command(line: list[str], said: Path, at: int, signal_number: int) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        _Countdown(at, signal_number)
        code = cli.main(line)
        file.flush()
    sys.exit(code)


def _compress(arguments: Sequence[Any], at: int, given: dict[str, Any]) -> None:
    if at:
        _Countdown(at)
    api.compress(*arguments, **given)


def _count(arguments: Sequence[Any], results: Any) -> None:
    countdown = _Countdown(0)
    api.compress(*arguments)
    results.send(countdown.calls)


class _Countdown:
    """Gets a signal before a change of the disk takes place."""

    def __init__(self, at: int, signal_number: int = signal.SIGKILL) -> None:
        self.at, self.calls, self.signal_number = at, 0, signal_number
        for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
            setattr(os, name, self._counting(getattr(os, name)))
        shutil.rmtree = self._counting(shutil.rmtree)
        for module in (checkpoint, safetensors.torch):
            module.save_file = self._counting(module.save_file)  # type: ignore[attr-defined]

    def _counting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), self.signal_number)
            return change(*given, **named)

        return count
