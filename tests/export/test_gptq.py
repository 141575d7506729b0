"""GPTQ's layout holds the same weights: read bit by bit as it is described, and by gptqmodel where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

from llmcompress.cli import main
from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.errors import UserError
from llmcompress.export import gptq
from llmcompress.export.quantized import Scheme
from llmcompress.export.to_gptq import to_gptq
from llmcompress.inspection.inspect import inspect
from llmcompress.runtime.loading import load, runtime_of
from tests.export.test_quantized import all_but_head, save, tiny_llama

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
GRIDS = ["int4-g32", "int4", "int4-tensor", "int8", "int8-g64", "int3-g32", "int2-g32", "int4-g32-asym", "int3-asym"]


def quantized(grid: QuantGrid, rows: int = 64, columns: int = 128) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    levels = grid.fit(weight, torch.float16)
    return QuantizedWeight(grid.quantize(weight, levels), levels, grid)


def read_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """(n·bits/32, m) words → (n, m) codes, each column one long number that is read from its lowest bit on."""
    columns = []
    for column in words.T:
        number = int.from_bytes(column.astype("<i4").tobytes(), "little")
        columns.append([number >> bits * i & (1 << bits) - 1 for i in range(32 * len(column) // bits)])
    return np.array(columns).T


def weight_of(tensors: dict[str, Tensor], bits: int, added: int) -> Tensor:
    """(out, in): scale · (q − zero), as the layout is described."""
    codes = read_bits(tensors["qweight"].numpy(), bits)
    zeros = read_bits(tensors["qzeros"].numpy().T, bits).T + added
    group = tensors["g_idx"].numpy()
    return torch.from_numpy(tensors["scales"].float().numpy()[group] * (codes - zeros[group])).T.float()


@pytest.mark.parametrize("word", GRIDS)
@pytest.mark.parametrize(("convention", "added"), [("gptq", 1), ("gptq_v2", 0)])
def test_packed_weights_read_bit_by_bit_are_the_same(word: str, convention: str, added: int) -> None:
    matrix = quantized(W(word))
    tensors = gptq.pack(matrix, convention)
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.float16}
    assert torch.equal(weight_of(tensors, matrix.grid.bits, added), matrix.dequantize())


@pytest.mark.parametrize("word", GRIDS)
@pytest.mark.parametrize("convention", ["gptq", "gptq_v2"])
def test_unpacking_gives_codes_scales_and_zero_points_back(word: str, convention: str) -> None:
    matrix = quantized(W(word))
    config = gptq.configuration(matrix.grid, convention, "test")
    found = gptq.unpack(gptq.pack(matrix, convention), config)
    assert torch.equal(found["weight"], matrix.codes)
    assert torch.equal(found["weight_scale"].float(), matrix.levels.scale.expand(64, -1))
    assert ("weight_zero_point" in found) != matrix.grid.symmetric
    if matrix.levels.zero_point is not None:
        assert torch.equal(found["weight_zero_point"].float(), matrix.levels.zero_point)


def test_a_zero_point_of_zero_fits_the_second_convention_only() -> None:
    grid = W("int4-g32-asym")
    matrix = quantized(grid)
    assert matrix.levels.zero_point is not None
    matrix.levels.zero_point.fill_(-8)
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq.pack(matrix, "gptq")
    assert torch.equal(weight_of(gptq.pack(matrix, "gptq_v2"), 4, 0), matrix.dequantize())


def test_columns_in_another_order_are_refused() -> None:
    matrix = quantized(W("int4-g32"))
    tensors = gptq.pack(matrix, "gptq")
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(UserError, match="desc_act"):
        gptq.unpack(tensors, gptq.configuration(matrix.grid, "gptq", "test"))


def folder_of(path: Path, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    model = tiny_llama(dtype)
    save(model, all_but_head(model, scheme), path)
    return model


@pytest.mark.parametrize("word", ["int4-g32", "int8", "int3-g32"])
@pytest.mark.parametrize("kind", gptq.KINDS)
def test_a_converted_folder_is_the_same_model(tmp_path: Path, word: str, kind: str) -> None:
    folder_of(tmp_path / "from", Scheme(W(word)))
    assert main(["pack", str(tmp_path / "from"), str(tmp_path / "to"), "--to", kind]) == 0
    tensors = {k: v for file in (tmp_path / "to").glob("*.safetensors") for k, v in load_file(file).items()}
    config = json.loads((tmp_path / "to" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "to" / "quantize_config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "from")
    tokens = torch.randint(128, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense(tokens)
    for name, module in dense.model.layers.named_modules():
        stem = f"model.layers.{name}."
        if stem + "qweight" in tensors:
            parts = {part: tensors.pop(stem + part) for part in gptq.PARTS}
            found = weight_of(parts, config["bits"], kind == "gptq")
            assert torch.equal(found.to(torch.bfloat16), module.weight)
    assert sorted(tensors) == sorted(name for name, _ in dense.named_parameters() if "proj.weight" not in name)


@pytest.mark.filterwarnings("ignore:.*quantized matrices dense")
@pytest.mark.parametrize("word", ["int4-g32", "int4-g32-asym", "int8"])
def test_gptqs_layout_runs_here_as_the_folder_it_came_from(tmp_path: Path, word: str) -> None:
    folder_of(tmp_path / "from", Scheme(W(word)))
    to_gptq(tmp_path / "from", tmp_path / "to", "gptq-v2")
    tokens = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(0))
    here, there = load(tmp_path / "to"), load(tmp_path / "from")
    assert runtime_of(here).kernels == runtime_of(there).kernels == {"dense" if word == "int8" else "int4": 14}
    with torch.no_grad():
        assert torch.allclose(here(tokens).logits.float(), there(tokens).logits.float(), atol=0.02)


def test_inspect_knows_what_it_sees(tmp_path: Path) -> None:
    folder_of(tmp_path / "from", Scheme(W("int4-g32")))
    to_gptq(tmp_path / "from", tmp_path / "to", "gptq")
    found = inspect(tmp_path / "to")
    assert found.holds and found.verdict.held["hashes"] > 0
    packed = [m for m in found.matrices if m.format == "gptq"]
    assert len(packed) == 14 and all(4 + 16 / 32 <= m.bits <= 4 + 20 / 32 for m in packed)


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (Scheme(W("int8"), A("int8")), "inputs or outputs are rounded"),
        (Scheme(W("int5")), "no grid of 2, 3, 4 or 8-bit"),
        (Scheme(W("fp8")), "no grid of 2, 3, 4 or 8-bit"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, scheme: Scheme, what: str) -> None:
    folder_of(tmp_path / "from", scheme)
    with pytest.raises(UserError, match=what):
        to_gptq(tmp_path / "from", tmp_path / "to", "gptq")
    assert not (tmp_path / "to").exists()


def test_different_grids_and_matrices_left_dense_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    names = all_but_head(model, Scheme(W("int4-g32")))
    save(model, {name: Scheme(W("int8")) if "down" in name else s for name, s in names.items()}, tmp_path / "mixed")
    save(model, {name: s for name, s in names.items() if "down" not in name}, tmp_path / "partly")
    model.save_pretrained(tmp_path / "dense")
    for name, what in (("mixed", "has 2 grids"), ("partly", "dense"), ("dense", "no quantized matrices")):
        with pytest.raises(UserError, match=what):
            to_gptq(tmp_path / name, tmp_path / "to", "gptq")


@pytest.mark.parametrize("kind", gptq.KINDS)
@pytest.mark.parametrize("word", ["int4-g32", "int8-g32", "int3-g32"])
def test_transformers_and_gptqmodel_read_it(tmp_path: Path, word: str, kind: str) -> None:
    """Skipped where the two packages are missing: they are none of this program's."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    folder_of(tmp_path / "from", Scheme(W(word)))
    to_gptq(tmp_path / "from", tmp_path / "to", kind)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "from")
    settings = GPTQConfig(bits=int(word[3]), backend="torch")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "to", quantization_config=settings)
    tokens = torch.randint(128, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # it would compile for minutes
        a, b = expected(tokens).logits.float(), found(tokens).logits.float()
    assert (a - b).norm() < 0.02 * a.norm()
