"""The program, run on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmcompress import cli
from tests.commands.helpers import Weights, tree


@pytest.fixture
def run(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the program in `tmp_path` on the tiny checkpoint; gives its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, model: object = checkpoint, calibration: object = text) -> tuple[int, str, str]:
        given = [
            "--model",
            model,
            "--recipe",
            "wanda-2of4",
            "--samples",
            4,
            "--length",
            16,
            "--calibration",
            calibration,
        ]
        code = cli.main([str(a) for a in (*given, *arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    """The one line that a bad input gets, having seen that nothing was written."""

    def refusal(*arguments: object, **given: object) -> str:
        before = tree(tmp_path)
        code, out, err = run(*arguments, **given)
        assert (code, out) == (2, "")
        assert err.startswith("llmcompress: ") and err.endswith("\n") and err.count("\n") == 1
        assert tree(tmp_path) == before
        return err

    return refusal


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other weights, or other entries in its config.json."""

    def altered(change: Callable[[Weights], object] | None = None, **config: object) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "altered"))
        if change:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return altered
