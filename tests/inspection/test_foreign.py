"""Folders that other programs wrote are verified as far as they can be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from llmcompress.inspection.inspect import inspect
from tests.inspection.damage import UP, change_json, wrong


def foreign(checkpoint: Path, folder: Path, weights: dict[str, Any], form: str) -> Path:
    """The tiny checkpoint quantized by compressed-tensors itself."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(form)
    found = {}
    for name, value in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = value
            continue
        top = 127.5 if weights["type"] == "int" else 448.0
        state = {"weight": value, "weight_scale": value.abs().amax(1, keepdim=True) / top}
        if not weights["symmetric"]:
            state["weight_zero_point"] = torch.zeros(value.shape[0], 1, dtype=torch.int8)
        stem = name.removesuffix("weight")
        found |= {stem + part: t.contiguous() for part, t in compressor.compress(state, scheme).items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    change_json(folder, "config.json", lambda c: c.update(quantization_config={
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group}, "sparsity_config": {"format": "dense"},
    }))  # fmt: skip
    return folder


ARGUMENTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
FOREIGN = [
    (ARGUMENTS, "int-quantized"),
    (ARGUMENTS, "pack-quantized"),
    ({**ARGUMENTS, "num_bits": 4}, "pack-quantized"),
    ({**ARGUMENTS, "type": "float"}, "float-quantized"),
]


@pytest.mark.parametrize(("weights", "form"), FOREIGN, ids=[f"{f}-{w['num_bits']}" for w, f in FOREIGN])
def test_a_folder_of_another_program_is_verified_as_far_as_it_goes(
    checkpoint: Path, tmp_path: Path, weights: dict[str, Any], form: str
) -> None:
    folder = foreign(checkpoint, tmp_path / "foreign", weights, form)
    found = inspect(folder)
    assert found.compressed and not found.verdict.wrong
    assert found.verdict.held["scales"] == 14 and len(found.matrices) == 16
    assert any("no record" in said for said in found.verdict.unchecked)
    assert any(said.startswith("sparsity_config of") for said in found.verdict.unchecked)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight_scale"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert wrong(folder)["scales"]
