"""Runs without calibration rows, of recipes whose steps read none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import Recipe, api
from llmcompress.calibration import Calibration, token_rows
from llmcompress.cli import main
from llmcompress.errors import UserError
from llmcompress.export.destination import RECORD
from llmcompress.needs import first_that_reads
from llmcompress.report import Report
from tests.architectures import tiny_folder

#: whose steps look at nothing but weights
DATA_FREE = {"rtn-w8a8", "fp8-dynamic", "magnitude-50", "mxfp4", "nvfp4"}


def compressed(model: Path, recipe: str | Recipe, output: Path, calibration: str) -> Report:
    options = api.Options(calibration=calibration, samples=4, length=16, evaluate=False)
    return api.compress(model, recipe, output, options)


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_exactly_these_packaged_recipes_read_no_rows() -> None:
    assert {name for name in Recipe.names() if not first_that_reads(Recipe.load(name))} == DATA_FREE


@pytest.mark.parametrize("recipe", sorted(DATA_FREE))
def test_the_bytes_are_those_of_a_run_with_rows(tmp_path: Path, recipe: str) -> None:
    model = tiny_folder(tmp_path / "model", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    without, with_rows = (compressed(model, recipe, tmp_path / data, data) for data in ("none", "self"))
    assert weights(tmp_path / "none") == weights(tmp_path / "self")
    assert without.calibration["samples"] == 0 < with_rows.calibration["samples"]
    assert without.warnings == with_rows.warnings


def test_no_block_sees_more_than_the_probe(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = torch.nn.functional.linear

    def linear(x: torch.Tensor, *given: object) -> torch.Tensor:
        seen.append(x[..., 0].numel())
        return product(x, *given)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    compressed(checkpoint, "rtn-w8a8", tmp_path / "out", "none")
    assert seen and max(seen) <= 16


def test_errors_are_those_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    report = compressed(checkpoint, "magnitude-50", tmp_path / "out", "none")
    dense, pruned = (tensors(folder) for folder in (checkpoint, tmp_path / "out"))
    for matrix in report.matrices:
        W, Q = dense[f"{matrix.name}.weight"].double(), pruned[f"{matrix.name}.weight"].double()
        assert matrix.relative_error == pytest.approx(float((W - Q).square().sum() / W.square().sum()), rel=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "no tokens, so that errors are those of the weights" in page
    assert "‖W − Q‖² ÷ ‖W‖², as no rows were read" in page and "on calibration rows" not in page
    assert "No data was used." in (tmp_path / "out" / "README.md").read_text()


def test_experts_are_no_less_served_than_other_matrices(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mixtral")
    report = compressed(folder, "rtn-w8a8", tmp_path / "out", "none")
    assert any("experts" in matrix.name for matrix in report.matrices)
    assert not [warning for warning in report.warnings if "calibration token" in warning]


def test_a_finished_run_is_recognised(checkpoint: Path, tmp_path: Path) -> None:
    options = api.Options(calibration="none", length=16, evaluate=False)
    first = api.compress(checkpoint, "rtn-w8a8", tmp_path / "out", options)
    again = api.compress(checkpoint, "rtn-w8a8", tmp_path / "out", options, resume=True)
    assert again.to_json() == first.to_json()


@pytest.mark.parametrize(
    ("recipe", "step"),
    [
        ("gptq-w4a16", "quantize (gptq)"), ("jsq-gptq", "prune (jsq)"), ("awq-w4a16", "smooth (awq)"),
        ("fp8-static", "quantize (rtn)"), ("fp8-dynamic-kv", "kv_cache"), ("llm-pruner-20", "prune (llm_pruner)"),
    ],
)  # fmt: skip
def test_steps_that_read_rows_are_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, recipe: str, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="reads calibration rows, and there are none") as refusal:
        compressed(checkpoint, recipe, output, "none")
    assert step in str(refusal.value)
    given = ["--model", str(checkpoint), "--recipe", recipe, "--calibration", "none", "--output", str(output)]
    assert main(given) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_no_rows(checkpoint: Path) -> None:
    assert api.plan(checkpoint, "rtn-w8a8", options=api.Options(calibration="none")).rows[0] == 0


def test_token_rows_of_nothing_have_the_length_that_was_asked_for(checkpoint: Path) -> None:
    rows = token_rows(Calibration("none", 4, 16), checkpoint)
    assert rows.shape == (0, 16) and rows.dtype == torch.int64


def test_the_record_says_that_there_was_no_data(checkpoint: Path, tmp_path: Path) -> None:
    compressed(checkpoint, "rtn-w8a8", tmp_path / "out", "none")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["calibration"]["source"] == "none"
