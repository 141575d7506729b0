"""A run that is killed at any moment goes on, and writes the bytes of one that was not."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcompress import api, compress
from llmcompress.errors import Fault, UserError
from llmcompress.measure import versions
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.resume import folder_of
from llmcompress.walk import Walk
from tests import killing
from tests.architectures import tiny_folder

OPTIONS = api.Options(samples=4, length=16, device="cpu")
JSQ = Recipe.load("jsq")
KILLS = 10  # at changes of the disk, and as many at any time
MEASURED = ("seconds", "seconds_by_phase", "peak_memory_bytes", "output")
Arguments = tuple[Path, Recipe, Path, api.Options]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-block Llama."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """What an uninterrupted run of a recipe writes; each is made once."""
    folder = tmp_path_factory.mktemp("whole")
    found: dict[str, dict[str, bytes]] = {}

    def written(recipe: Recipe = JSQ, options: api.Options = OPTIONS) -> dict[str, bytes]:
        if recipe.hash not in found:
            compress(source, recipe, folder / recipe.hash / "out", options)  # the card says the folder's name
            found[recipe.hash] = contents(folder / recipe.hash / "out")
        return found[recipe.hash]

    return written


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a result; of the report, and of the page that shows it, what is not measured."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(found["report.json"])
    for block in report["blocks"]:
        del block["seconds"], block["peak_memory_bytes"]
    found["report.json"] = json.dumps({k: v for k, v in report.items() if k not in MEASURED}).encode()
    found.pop("report.html", None)
    return found


def stopped(arguments: Arguments, monkeypatch: pytest.MonkeyPatch, matrix: str, error: BaseException) -> None:
    """Runs until a matrix of this name, or below it, comes to be compressed."""
    serve = Walk._serve

    def break_off(walk: Walk, group: Any, *rest: Any) -> Any:
        if group.name.startswith(matrix):
            raise error
        return serve(walk, group, *rest)

    with monkeypatch.context() as patched, pytest.raises(type(error)):  # noqa: PT012
        patched.setattr(Walk, "_serve", break_off)
        compress(*arguments)


LATE = "model.layers.2.mlp.gate_proj"


# --- the same bytes ---


def test_a_run_that_is_killed_at_20_random_moments_ends_in_the_same_bytes(
    source: Path, whole: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    drawn = random.Random(0)
    counted, timed = ((source, JSQ, tmp_path / name, OPTIONS) for name in ("counted", "timed"))
    expected, number = whole(), killing.changes(counted)
    began = time.perf_counter()
    assert killing.run(timed) == 0
    seconds = time.perf_counter() - began
    moments: list[dict[str, Any]] = [{"at": at} for at in drawn.sample(range(1, number + 1), KILLS)]
    moments += [{"after": drawn.uniform(0, seconds)} for _ in range(KILLS)]
    killed = compared = 0
    for index, moment in enumerate(moments):
        arguments = (source, JSQ, tmp_path / str(index) / "out", OPTIONS)
        killed += killing.run(arguments, **moment) == -9
        compress(*arguments, resume=True)
        found = contents(tmp_path / str(index) / "out")
        assert found == expected, moment
        compared += sum(len(content) for content in found.values())
        assert [path.name for path in (tmp_path / str(index)).iterdir()] == ["out"]
    assert killed >= KILLS
    print(f"{killed} of {len(moments)} runs were killed, {compared} bytes compared")


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    source: Path, whole: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    for at in (15, 15, 10, 20):
        assert killing.run(arguments, at=at, resume=True) == -9
    compress(*arguments, resume=True)
    assert contents(tmp_path / "out") == whole()


LANES = Recipe.load("sparsegpt-best-50")
BLOCKS = Recipe.load("wanda-50", ["propagate=block"])
PRUNED = Recipe.load("jsq", ["propagate=pruned"])


@pytest.mark.parametrize("recipe", [LANES, BLOCKS, PRUNED], ids=["two lanes", "block", "pruned"])
def test_whatever_the_tokens_go_on_through_they_go_on_from_where_they_were(
    recipe: Recipe, source: Path, whole: Callable[..., dict[str, bytes]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = (source, recipe, tmp_path / "out", OPTIONS)
    stopped(arguments, monkeypatch, LATE, RuntimeError("broken"))
    compress(*arguments, resume=True)
    assert contents(tmp_path / "out") == whole(recipe)


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gemma2", "bloom", "opt"])
def test_every_kind_of_block_goes_on(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "dense", model_type)
    options = replace(OPTIONS, evaluate=False)
    report = compress(source, "wanda-50", tmp_path / "whole" / "out", options)
    arguments = (source, Recipe.load("wanda-50"), tmp_path / "out", options)
    stopped(arguments, monkeypatch, report.blocks[1].name, RuntimeError("broken"))
    compress(*arguments, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.parametrize("broken", ["recover", "compare"])
def test_a_structured_step_that_was_finished_is_not_taken_again(
    broken: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load("llm-pruner-w8a8")
    options = replace(OPTIONS, recover_steps=2)
    compress(source, recipe, tmp_path / "whole" / "out", options)

    def fail(*given: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):  # noqa: PT012
        patched.setattr(f"llmcompress.run.{broken}", fail)
        compress(source, recipe, tmp_path / "out", options)
    monkeypatch.setattr("llmcompress.run.restructure", fail)
    compress(source, recipe, tmp_path / "out", options, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


# --- what is not done twice ---


def test_finished_blocks_are_not_solved_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    stopped(arguments, monkeypatch, LATE, RuntimeError("broken"))
    serve, served = Walk._serve, []

    def note(walk: Walk, group: Any, *rest: Any) -> Any:
        served.append(group.name)
        return serve(walk, group, *rest)

    monkeypatch.setattr(Walk, "_serve", note)
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)  # nor are the rows drawn again
    monkeypatch.setattr("llmcompress.run.copy_rest", None)  # nor what lies outside the blocks copied
    report = compress(*arguments, resume=True)
    assert served and all(name.startswith("model.layers.2.") for name in served)
    assert [block.name for block in report.blocks] == [f"model.layers.{i}" for i in range(3)]
    assert all(block.seconds > 0 for block in report.blocks)


def test_a_complete_output_is_said_to_be_and_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    first = compress(*arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)
    again = compress(*arguments, resume=True, progress=Progress())
    assert "out is complete already" in capsys.readouterr().err
    assert again.to_json() == first.to_json()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_anything_to_go_on_with_a_run_begins(source: Path, tmp_path: Path) -> None:
    assert compress(source, "wanda-2of4", tmp_path / "out", OPTIONS, resume=True).blocks


# --- refusals ---


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("jsq", {"seed": 1}, "options.seed was 0, is 1"),
    ("jsq", {"samples": 3}, "options.samples was 4, is 3"),
    ("jsq", {"dtype": "bfloat16"}, "arithmetic was torch.float32 on cpu, is torch.bfloat16 on cpu"),
    ("jsq-2of4", {}, "recipe.name was jsq, is jsq-2of4"),
]


@pytest.mark.parametrize(("recipe", "changed", "told"), OTHERS)
@pytest.mark.parametrize("complete", [True, False])
def test_another_run_is_refused_and_told_what_differs(
    recipe: str, changed: dict[str, Any], told: str, complete: bool, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    if complete:
        compress(*arguments)
    else:
        stopped(arguments, monkeypatch, LATE, RuntimeError("broken"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="another run") as refused:
        compress(source, recipe, tmp_path / "out", replace(OPTIONS, **changed), resume=True)
    assert told in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("changed", ["model", "data", "version"])
def test_another_model_text_or_version_is_refused(
    changed: str, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, words = tiny_folder(tmp_path / "dense"), tmp_path / "words.txt"
    for file in checkpoint.glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    words.write_bytes(text.read_bytes())
    arguments = (source, Recipe.load("wanda-50"), tmp_path / "out", replace(OPTIONS, calibration=str(words)))
    stopped(arguments, monkeypatch, "model.layers.1.mlp.gate_proj", RuntimeError("broken"))
    if changed == "model":
        tiny_folder(source, seed=1)
    elif changed == "data":
        words.write_text("w1 " + words.read_text())
    else:
        monkeypatch.setattr("llmcompress.identity.versions", lambda: versions() | {"torch": "0.1"})
    told = {"model": "model files.model.safetensors", "data": "words.txt was", "version": "versions.torch was"}
    with pytest.raises(UserError, match="another run") as refused:
        compress(*arguments, resume=True)
    assert told[changed] in str(refused.value)


def test_an_unfinished_run_is_neither_overwritten_nor_taken_up_unasked(
    source: Path, whole: Callable[..., dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    stopped(arguments, monkeypatch, LATE, RuntimeError("broken"))
    with pytest.raises(UserError, match=r"an unfinished run is kept there; go on with it by --resume"):
        compress(*arguments)
    assert folder_of(tmp_path / "out").is_dir()
    compress(*arguments, force=True)
    assert contents(tmp_path / "out") == whole()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_was_killed_goes_on_without_being_forced_again(
    source: Path, whole: Callable[..., dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, "wanda-50", tmp_path / "out", OPTIONS)
    before = contents(tmp_path / "out")
    arguments = (source, JSQ, tmp_path / "out", OPTIONS)
    with monkeypatch.context() as patched, pytest.raises(Fault):  # noqa: PT012
        patched.setattr("llmcompress.export.checkpoint.CheckpointWriter.publish", _full)
        compress(*arguments, force=True)
    assert contents(tmp_path / "out") == before
    compress(*arguments, resume=True)
    assert contents(tmp_path / "out") == whole()


def _full(*given: Any) -> None:
    raise OSError(28, "No space left on device")
