"""`eval` as a user meets it: bad input is one line and exit code 2, JSON is nothing but JSON, noise is called noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress import cli
from llmcompress.evaluate.judged import Judged

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the subcommand in `tmp_path` on the tiny checkpoint; gives its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, model: object = checkpoint) -> tuple[int, str, str]:
        code = cli.main(["eval", str(model), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_model_beside_itself_is_within_noise_on_the_terminal(run: Run, checkpoint: Path, text: Path) -> None:
    code, out, _ = run("--reference", checkpoint, "--text", text, "--length", 32, "--stride", 8)
    assert code == 0
    assert "within noise" in out and "worse" not in out and "better" not in out
    assert "rolling window of 32 tokens, stride 8, prefix </s>" in out
    for name in (
        "perplexity per token",
        "perplexity per word",
        "perplexity per byte",
        "KL divergence",
        "top-1",
        "top-5",
    ):
        assert name in out


def test_json_to_standard_output_is_nothing_but_json(run: Run, text: Path) -> None:
    code, out, err = run("--text", text, "--length", 32, "--json", "-")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert found["texts"][0]["tokens"] == 600 and found["command"].startswith("python -m llmcompress eval ")


def test_json_to_a_file_is_beside_the_table(run: Run, text: Path, tmp_path: Path) -> None:
    code, out, _ = run("--text", text, "--length", 32, "--json", "result.json")
    assert code == 0 and "perplexity per token" in out
    assert json.loads((tmp_path / "result.json").read_text())["model"]["runtime"] == "simulated"


def test_what_load_makes_of_a_folder_is_judged_with_a_runtime(run: Run, text: Path) -> None:
    figures = []
    for runtime in ("simulated", "dense"):
        code, out, _ = run("--text", text, "--length", 32, "--json", "-", "--runtime", runtime)
        found = json.loads(out)
        assert code == 0 and found["model"]["runtime"] == runtime
        figures.append(found["texts"][0]["perplexity"]["token"]["value"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to evaluate on; give --text FILE, --tasks NAME, or both"),
        (["--text", "none.txt"], "none.txt: no such file"),
        (["--text", "blank.txt"], "blank.txt: is empty"),
        (["--text", "bytes.txt"], "bytes.txt: is not UTF-8 text"),
        (["--text", "fields.jsonl"], "fields.jsonl, line 1: has no text"),
        (["--text", "TEXT", "--length", "65"], "65 tokens are more than the model's 64 positions; use at most 64"),
        (["--text", "TEXT", "--length", "1"], "--length: is 1; use 2 or more"),
        (["--text", "TEXT", "--length", "16", "--stride", "17"], "--stride: 17 is more than a window's 16 tokens"),
        (["--text", "TEXT", "--length", "16", "--stride", "0"], "--stride: is 0; use 1 or more"),
        (["--text", "TEXT", "--windows", "rows", "--stride", "4"], "--stride: rows do not overlap"),
        (["--text", "one.txt", "--windows", "rows", "--length", "16"], "one.txt: has no token to predict"),
        (["--text", "TEXT", "--limit", "0"], "--limit: is 0; use 1 or more"),
        (["--text", "TEXT", "--seed", "-1"], "--seed: seed -1 is negative"),
        (["--text", "TEXT", "--runtime", "int9"], "--runtime: unknown 'int9'; did you mean 'int"),
        (["--text", "TEXT", "--reference", "lama"], "--model lama: neither a preset, a folder nor a Hub id"),
        (["--text", "TEXT", "--json", "no/such/folder.json"], "--json no/such/folder.json: its folder does not exist"),
        (["--text", "TEXT", "--json", "."], "--json .: is a folder"),
        (["--text", "TEXT", "--windows", "rolled"], "argument --windows: invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_no_model_runs(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "fields.jsonl").write_text('{"content": "w1"}\n')
    (tmp_path / "one.txt").write_text("w1 w2")
    monkeypatch.setattr(Judged, "logits", lambda *_: pytest.fail("a model ran"))
    code, out, err = run(*(str(text) if a == "TEXT" else a for a in arguments))
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1


def test_a_model_without_a_tokenizer_is_told(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run("--text", text, model="bare")
    assert code == 2 and "bare: its tokenizer cannot be read" in err and err.count("\n") == 1


def test_a_model_that_is_none_is_told(run: Run, text: Path) -> None:
    code, _, err = run("--text", text, model="lama")
    assert code == 2 and "did you mean 'llama'" in err and err.count("\n") == 1
