"""What fails on the way leaves nothing, or what a resumed run goes on with."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from llmcompress.model.groups import InputGroup
from llmcompress.walk import Walk
from tests.commands.helpers import python, tree


def test_too_small_a_disk_is_refused_before_calibration(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)  # is not reached
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "of disk space are free" in refusal()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The third shard, the second block's, cannot be written."""
    from llmcompress.export import checkpoint as module

    calls: list[object] = []

    def save(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        save_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_file", save)


GOES_ON = "1 finished block kept, the same command with --resume goes on"


def test_a_disk_that_fills_up_is_one_line_and_leaves_what_resume_goes_on_with(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as full:
        failing(full, OSError(errno.ENOSPC, "No space left on device"))
        code, out, err = run("--json", "--no-eval", "--output", "out")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "out: the disk is full; free some space" in err and GOES_ON in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run("--json", "--no-eval", "--output", "out", "--resume")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_says_how_it_goes_on(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    code, out, err = run("--json", "--no-eval", "--output", "out")
    assert (code, out, err) == (130, "", f"llmcompress: interrupted, {GOES_ON}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_run_that_is_interrupted_before_it_calibrates_leaves_nothing(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcompress.run.draw_tokens", interrupted)
    code, out, err = run("--json", "--no-eval")
    assert (code, out, err) == (130, "", "llmcompress: interrupted, nothing was written\n")
    assert not tree(tmp_path)


def test_an_internal_failure_keeps_the_finished_blocks(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = Walk._serve

    def broken(walk: Walk, group: InputGroup, *rest: Any) -> Any:
        if group.name == "model.layers.1.mlp.down_proj":
            raise RuntimeError("a bug")
        return serve(walk, group, *rest)

    monkeypatch.setattr(Walk, "_serve", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--output", "new/out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.partial"]
    assert [path.name for path in (tmp_path / "new" / "out.partial" / "blocks").iterdir()] == ["00000.json"]


def test_an_internal_failure_exits_with_one_and_a_traceback(tmp_path: Path) -> None:
    script = """
import runpy
from llmcompress.commands import compress
compress.run = lambda arguments: 1 / 0
runpy.run_module("llmcompress", run_name="__main__")
"""
    done = python(script, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


# --- what is printed ---
