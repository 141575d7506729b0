"""Small floating-point grids are the library's: scales, codes, and what it and transformers read back."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

from llmcompress.core.floats import float_codes, float_values
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.export.floats import unloadable
from llmcompress.export.quantized import (
    Scheme,
    pack,
    quantization_config,
    schemes_of,
    stored_bits_per_weight,
    unpack,
)
from llmcompress.methods.rtn import RTN
from llmcompress.recipe import Recipe
from tests.export.test_quantized import all_but_head, fake_quantized, save, tiny_llama

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
SCHEMES = {
    "fp8-dynamic": Scheme(W("fp8"), A("fp8")),
    "fp8-static": Scheme(W("fp8"), A("fp8-static")),
    "fp8-tensor": Scheme(W("fp8-tensor"), A("fp8-static")),
    "fp8-weights": Scheme(W("fp8")),
    "nvfp4": Scheme(W("nvfp4")),
    "mxfp4": Scheme(W("mxfp4")),
}


def quantized(scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, QuantizedWeight]:
    torch.manual_seed(0)
    weight = (torch.randn(48, 256) * torch.logspace(-3, 1, 48)[:, None]).to(dtype).float()
    levels = scheme.weights.fit(weight, dtype)
    return weight, QuantizedWeight(scheme.weights.quantize(weight, levels), levels, scheme.weights)


def static(scheme: Scheme) -> Levels | None:
    fixed = scheme.activations is not None and not scheme.activations.dynamic
    return Levels(torch.tensor([[3 / 128]])) if fixed else None


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_decompresses_our_tensors_to_our_values(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    _, weight = quantized(scheme, dtype)
    group = QuantizationConfig.model_validate(quantization_config({"a": scheme}, ["a"])).config_groups["group_0"]
    read = BaseCompressor.get_value_from_registry(group.format).decompress(
        pack(weight, scheme, dtype, static(scheme)), group
    )
    values = weight.dequantize()
    # The library multiplies 4-bit codes by their scales in bfloat16.
    assert (read["weight"].float() - values).abs().max() <= values.abs().max() * 2**-8
    if dtype == torch.float32 and name.startswith("fp8"):
        assert torch.equal(read["weight"], values)


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_are_those_the_library_calculates(name: str) -> None:
    scheme = SCHEMES[name]
    weight, found = quantized(scheme, torch.float32)
    args = QuantizationConfig.model_validate(quantization_config({"a": scheme}, ["a"])).config_groups["group_0"].weights
    low, high = scheme.weights.bounds(weight)
    outer = found.levels.outer
    theirs, _ = calculate_qparams(low, high, args, global_scale=outer)
    assert torch.allclose(theirs.float().view_as(low), found.levels.scale * (1 if outer is None else outer), rtol=1e-6)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_codes_are_the_nearest_and_read_back_as_themselves(kind: str) -> None:
    every = torch.arange(-127 if kind == "fp8" else 0, 127 if kind == "fp8" else 16).to(torch.int8)
    values = float_values(kind, every)
    assert torch.equal(float_values(kind, float_codes(kind, values)).nan_to_num(), values.nan_to_num())
    x = torch.randn(500) * 3
    distance = (x - float_values(kind, float_codes(kind, x))).abs()
    assert torch.allclose(distance, (x[:, None] - values[~values.isnan()]).abs().amin(1), atol=1e-6)
    assert (float_codes(kind, torch.tensor([0.0, -1e-9])) == 0).all() or kind == "fp8"


@pytest.mark.parametrize("name", SCHEMES)
def test_unpack_inverts_pack_and_the_config_reads_back(name: str) -> None:
    scheme = SCHEMES[name]
    _, weight = quantized(scheme, torch.bfloat16)
    back = unpack(pack(weight, scheme, torch.bfloat16, static(scheme)), scheme)
    assert torch.equal(back.codes, weight.codes) and torch.allclose(back.levels.scale, weight.levels.scale, rtol=1e-6)
    names = ["layers.0.a", "layers.1.a", "lm_head"]
    schemes = dict.fromkeys(names[:2], scheme)
    assert schemes_of(quantization_config(schemes, names), names) == schemes


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_what_we_simulate(tmp_path, name: str) -> None:
    model = tiny_llama(torch.bfloat16 if name in ("nvfp4", "mxfp4") else torch.float32)
    schemes = all_but_head(model, SCHEMES[name])
    stored = save(model, schemes, tmp_path / "out")
    tokens = torch.randint(128, (2, 12))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs, ours = loaded(tokens).logits, fake_quantized(copy.deepcopy(model), stored, schemes)(tokens).logits
    # 4-bit values are rounded to bfloat16 by the library.
    assert (theirs - ours).norm() < (2e-2 if "4" in name else 1e-4) * ours.norm()


def test_four_bit_floats_are_for_bfloat16_models_since_loaders_widen_to_it() -> None:
    for kind in ("nvfp4", "mxfp4"):
        assert unloadable(W(kind), torch.bfloat16) == "" and "float32" in unloadable(W(kind), torch.float32)
    assert unloadable(W("fp8"), torch.float32) == unloadable(W("int4"), torch.float16) == ""


@pytest.mark.parametrize(("kind", "preset"), [("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16"), ("fp8", "FP8_DYNAMIC")])
def test_the_scheme_is_the_librarys_preset(kind: str, preset: str) -> None:
    scheme = SCHEMES["fp8-dynamic" if kind == "fp8" else kind]
    ours = QuantizationConfig.model_validate(quantization_config({"a": scheme}, ["a"])).config_groups["group_0"]
    theirs = preset_name_to_scheme(preset, ["Linear"])
    for mine, other in ((ours.weights, theirs.weights), (ours.input_activations, theirs.input_activations)):
        if mine is not None:
            fields = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype")
            assert [getattr(mine, f) for f in fields] == [getattr(other, f) for f in fields]


def test_matrices_that_a_server_fuses_share_the_outer_scale() -> None:
    small, large = Matrix("q", torch.randn(8, 32)), Matrix("k", torch.randn(8, 32) * 10)
    group = MatrixGroup([small, large])
    RTN(W("nvfp4")).apply(group, InputStats(32, frozenset()))
    assert torch.equal(small.quantized.levels.outer, large.quantized.levels.outer)


def test_four_bit_floats_take_their_bits_and_a_byte_a_group() -> None:
    assert stored_bits_per_weight(SCHEMES["nvfp4"], 256, torch.bfloat16) == 4.5
    assert stored_bits_per_weight(SCHEMES["mxfp4"], 256, torch.bfloat16) == 4.25
    assert stored_bits_per_weight(SCHEMES["fp8-dynamic"], 256, torch.bfloat16) == 8 + 16 / 256


@pytest.mark.parametrize("stage", [
    {"method": "gptq", "weights": "nvfp4"},
    {"method": "rtn", "weights": "nvfp4", "activations": "int8"},
    {"method": "rtn", "weights": "int8", "activations": "fp8"},
    {"method": "rtn", "weights": "nvfp4-g32"},
    {"method": "rtn", "weights": "fp8-g32"},
    {"method": "rtn", "weights": "fp8-asym"},
    {"method": "rtn", "weights": "fp4"},
])  # fmt: skip
def test_grids_without_a_format_are_refused(stage: dict[str, str]) -> None:
    with pytest.raises(UserError):
        Recipe.from_tree({"stages": [{"quantize": stage}]}, "r")
