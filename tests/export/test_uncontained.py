"""Grids that no checkpoint format holds: rounded, stored dense, and said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import Recipe, api, compress
from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.report import Report


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_powers_of_two_are_stored_in_the_models_dtype_and_the_report_says_so(
    method: str, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_tree({"stages": [{"quantize": {"method": method, "weights": "power4"}}]}, "t")
    options = api.Options(samples=4, length=16, evaluate=False)
    compress(checkpoint, recipe, tmp_path / "out", options)
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert any("no container for power levels" in warning for warning in report.warnings)
    stored = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    weight = next(tensor for name, tensor in stored.items() if name.endswith("q_proj.weight"))
    exponents = torch.log2(weight[weight != 0].abs())
    assert torch.equal(exponents, exponents.round()) and QuantGrid.parse_weights("power4").bits == 4


def test_inputs_cannot_be_rounded_where_the_weights_have_no_container(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_tree({"stages": [{"quantize": {"weights": "log4", "activations": "int8"}}]}, "t")
    with pytest.raises(UserError, match="no container for log levels"):
        compress(checkpoint, recipe, tmp_path / "out", api.Options(samples=4, length=16, evaluate=False))
    assert not (tmp_path / "out").exists()
