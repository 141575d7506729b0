"""An untouched folder of every recipe passes, its figures are told, and the exit code is the verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress import cli
from llmcompress.inspection.figures import MatrixFigures, outlier_ratio
from llmcompress.inspection.inspect import inspect
from llmcompress.inspection.table import block_rows, matrix_rows
from llmcompress.inspection.table import text as told
from tests.architectures import tiny_folder
from tests.inspection.damage import FAMILIES, FURTHER, UP, change_tensor, kill


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_an_untouched_folder_of_every_recipe_passes(made: Callable[..., Path], name: str) -> None:
    found = inspect(made(name))
    assert not found.verdict.wrong and not [u for u in found.verdict.unchecked if "README" not in u]
    held = found.verdict.held
    assert held["hashes"] == 8 and held["zeros"] == held["bits"] == held["record"] == 14 and held["transformers"]
    quantized = json.loads((made(name) / "config.json").read_text()).get("quantization_config")
    assert held["second opinion"] == (14 if quantized and not name.startswith("fp8") else 0)
    assert held["config"] >= (14 if quantized else 0)
    assert len(found.blocks) == 2 and all(len(groups) == 4 for groups in found.blocks.values())


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "opt", "bloom", "mixtral", "granitemoe"])
def test_other_architectures_pass(made: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    found = inspect(made("jsq", model=tiny_folder(tmp_path / model_type, model_type)))
    assert not found.verdict.wrong
    assert found.verdict.held["masks"] == found.verdict.held["zeros"] > 0


def test_an_evaluated_folder_passes_with_its_card(made: Callable[..., Path]) -> None:
    found = inspect(made("jsq", evaluate=True))
    assert found.holds and found.verdict.held["card"] == 3


# --- figures and the command ---


def figures(block: int, column_outlier: float = 4.0) -> list[MatrixFigures]:
    names = [f"model.layers.{block}.{kind}" for kind in ("q_proj", "down_proj")]
    return [
        MatrixFigures(n, f"model.layers.{block}", (8, 8), 64, 8.0, "int8", 0.5, 32, 4.0, column_outlier) for n in names
    ]


def test_many_blocks_that_are_alike_are_one_row_and_the_odd_one_stands_alone() -> None:
    rows = block_rows([f for block in range(80) for f in figures(block, 40.0 if block == 33 else 4.0)])
    assert [row[0] for row in rows] == [
        "block", "model.layers.0 … 32 (33 blocks, each)", "model.layers.33",
        "model.layers.34 … 79 (46 blocks, each)", "all",
    ]  # fmt: skip
    assert rows[2][-1] == "q_proj column 40, down_proj column 40" and rows[-1][1] == "160"
    assert len(block_rows([f for block in range(8) for f in figures(block)])) == 10
    assert len(matrix_rows([f for block in range(80) for f in figures(block)])) == 161


def test_the_outlier_ratio_is_the_peak_over_the_root_mean_square() -> None:
    values = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert outlier_ratio(values, 1) == pytest.approx(4 / (12.5**0.5))
    assert outlier_ratio(values, 0) == pytest.approx(2**0.5)
    assert outlier_ratio(torch.zeros(2, 2), 0) == 0


def test_a_planted_outlier_stands_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "outlier"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"][5, 7] = 100 * tensors[f"{UP}.weight"].std()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lines = told(inspect(folder)).splitlines()
    assert [line for line in lines if line.startswith("model.layers.1") and "mlp.up_proj column 8" in line]


def test_the_exit_code_tells_the_verdict(
    copied: Callable[..., Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("jsq")
    assert cli.main(["inspect", str(folder)]) == 0
    assert "everything that was checked holds" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--all"]) == 0
    assert f"{UP} " in capsys.readouterr().out
    assert cli.main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    change_tensor(folder, f"{UP}.weight", kill)
    assert cli.main(["inspect", str(folder)]) == 1
    assert "WRONG" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
