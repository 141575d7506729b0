"""What a machine may do to a run: one clear line each, the input untouched, no folder that looks finished, and the run
goes on once the fault is mended."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcompress import api, compress
from llmcompress.errors import Fault, UserError
from llmcompress.lock import Lock
from llmcompress.recipe import Recipe
from llmcompress.resume import KeptBlock, Workplace, folder_of
from llmcompress.walk import Walk
from tests import killing
from tests.architectures import tiny_folder

OPTIONS = api.Options(samples=4, length=16, device="cpu", evaluate=False)
RECIPE = Recipe.load("wanda-50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A model, and the weights of its compressed form."""
    folder = tmp_path_factory.mktemp("faults")
    source = tiny_folder(folder / "dense")
    compress(source, RECIPE, folder / "out", OPTIONS)
    return source, weights(folder / "out")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a small file system of its own."""
    mounted: list[Path] = []

    def disk(*options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=4m", *options)), "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems can be mounted by root alone")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def at_the_second_block(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens when the second block comes to be compressed and the first is on disk; once."""
    serve, keep, kept, happened = Walk._serve, Workplace.keep_block, threading.Event(), []

    def told(work: Workplace, index: int, block: KeptBlock) -> None:
        keep(work, index, block)
        kept.set()

    def first_this(walk: Walk, group: Any, *rest: Any) -> Any:
        if group.name.startswith("model.layers.1.") and not happened:
            assert kept.wait(60)
            happened.append(group)
            happens()
        return serve(walk, group, *rest)

    monkeypatch.setattr(Workplace, "keep_block", told)
    monkeypatch.setattr(Walk, "_serve", first_this)


def test_a_disk_that_fills_up_on_the_way(
    whole: tuple[Path, dict[str, bytes]], disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole
    folder = disk()

    def fill() -> None:
        with (folder / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):  # noqa: PT012
            while True:
                os.write(file.fileno(), bytes(4096))

    at_the_second_block(monkeypatch, fill)
    with pytest.raises(Fault, match=r"out: the disk is full; free some space; 1 finished block kept, .* --resume goes"):
        compress(source, RECIPE, folder / "out", OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == ["filler", "out.partial"]
    (folder / "filler").unlink()
    compress(source, RECIPE, folder / "out", OPTIONS, resume=True)
    assert weights(folder / "out") == expected


def test_too_small_a_disk_is_refused_at_once(whole: tuple[Path, dict[str, bytes]], disk: Callable[..., Path]) -> None:
    folder = disk("size=64k")
    with pytest.raises(UserError, match="of disk space are free"):
        compress(whole[0], RECIPE, folder / "out", OPTIONS)
    assert not list(folder.iterdir())


def test_a_read_only_place_is_refused_at_once(whole: tuple[Path, dict[str, bytes]], disk: Callable[..., Path]) -> None:
    folder = disk("ro")
    with pytest.raises(UserError, match="no permission to write"):
        compress(whole[0], RECIPE, folder / "out", OPTIONS)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_fails(
    number: int, whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "a file"))

    at_the_second_block(monkeypatch, fail)
    with pytest.raises(Fault, match=rf"a file: {os.strerror(number)}; mend that; 1 finished block.*--resume goes on"):
        compress(whole[0], RECIPE, tmp_path / "out", OPTIONS)
    compress(whole[0], RECIPE, tmp_path / "out", OPTIONS, resume=True)
    assert weights(tmp_path / "out") == whole[1]


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_that_cannot_be_read_any_more(
    damage: str, whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(whole[0], tmp_path / "dense"))
    file = source / "model.safetensors"
    content = file.read_bytes()

    def break_it() -> None:
        file.unlink() if damage == "gone" else os.truncate(file, 2000)

    at_the_second_block(monkeypatch, break_it)
    with pytest.raises(Fault, match=r"model\.safetensors: cannot be read any more .*fetch it again; 1 finished block"):
        compress(source, RECIPE, tmp_path / "out", OPTIONS)
    file.write_bytes(content)
    compress(source, RECIPE, tmp_path / "out", OPTIONS, resume=True)
    assert weights(tmp_path / "out") == whole[1]


def test_a_shard_that_is_damaged_from_the_start_is_refused_at_once(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(whole[0], tmp_path / "dense"))
    os.truncate(source / "model.safetensors", 20000)
    with pytest.raises(UserError, match="damaged or truncated"):
        compress(source, RECIPE, tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_two_runs_to_the_same_output(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole

    def second() -> None:
        for given in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(UserError, match=rf"out\.partial: process {os.getpid()} is writing it"):
                compress(source, RECIPE, tmp_path / "out", OPTIONS, **given)

    at_the_second_block(monkeypatch, second)
    compress(source, RECIPE, tmp_path / "out", OPTIONS)
    assert weights(tmp_path / "out") == expected


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    first = Lock(tmp_path / "place")
    with pytest.raises(UserError, match="is writing it"):
        Lock(tmp_path / "place")
    first.release()  # as the system does when a process ends
    Lock(tmp_path / "place").release()


@pytest.mark.parametrize("at", [12, 25])
def test_ctrl_c_says_that_resume_goes_on(at: int, whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    source, expected = whole
    output = tmp_path / "out"
    line = ["--model", str(source), "--recipe", "wanda-50", "--output", str(output), "--samples", "4"]
    line += ["--length", "16", "--device", "cpu", "--no-eval", "--json"]
    assert killing.command(line, tmp_path / "said", at=at) == 130
    said = (tmp_path / "said").read_text()
    assert said.startswith("llmcompress: interrupted, ") and said.count("\n") == 1 and "--resume goes on" in said
    assert not output.exists()
    compress(source, RECIPE, output, OPTIONS, resume=True)
    assert weights(output) == expected


def test_a_run_that_is_told_to_end_goes_on(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    line = ["--model", str(whole[0]), "--recipe", "wanda-50", "--output", str(tmp_path / "out"), "--samples", "4"]
    line += ["--length", "16", "--device", "cpu", "--no-eval", "--json"]
    assert killing.command(line, tmp_path / "said", at=25, signal_number=signal.SIGTERM) == -signal.SIGTERM
    assert folder_of(tmp_path / "out").is_dir() and not (tmp_path / "out").exists()
    compress(whole[0], RECIPE, tmp_path / "out", OPTIONS, resume=True)
    assert weights(tmp_path / "out") == whole[1]


def test_a_user_s_mistake_on_the_way_keeps_nothing(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UserError("NaN or infinite activations reach it", "model.layers.1")

    at_the_second_block(monkeypatch, refuse)
    with pytest.raises(UserError, match="NaN"):
        compress(whole[0], RECIPE, tmp_path / "new" / "out", replace(OPTIONS, seed=3))
    assert not list(tmp_path.iterdir())
