"""The saved folder is what was measured: transformers and the library read back our codes, scales and logits."""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.utils.match import match_name
from torch import nn
from transformers import AutoModelForCausalLM, Conv1D, LlamaConfig, LlamaForCausalLM

from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.quantized import (
    Scheme,
    name_patterns,
    pack,
    quantization_config,
    schemes_of,
    storage_bits,
    storage_format,
    storage_note,
    unpack,
    unpack_activations,
    unsupported,
)
from llmcompress.runtime.loading import load

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
SCHEMES = {
    "w8a8": Scheme(W("int8"), A("int8")),
    "w8a8-tensor": Scheme(W("int8-tensor"), A("int8-tensor")),
    "w8a8-static": Scheme(W("int8"), A("int8-static")),
    "w8a8-static-asym": Scheme(W("int8"), A("int8-static-asym")),
    "w8a8-asym": Scheme(W("int8-asym"), A("int8-asym")),
    "w8a16": Scheme(W("int8")),
    "w8a16-asym": Scheme(W("int8-g32-asym")),
    "w4a16-g32": Scheme(W("int4-g32")),
    "w4a16-g128": Scheme(W("int4-g128")),
    "w4a16-channel": Scheme(W("int4")),
    "w4a16-tensor": Scheme(W("int4-tensor")),
    "w4a16-g32-asym": Scheme(W("int4-g32-asym")),
    "w4a16-mse": Scheme(W("int4-g32-mse")),
    "w3a16-g32": Scheme(W("int3-g32")),
    "w2a16-g16": Scheme(W("int2-g16")),
    "w5a16": Scheme(W("int5")),
    "w7a16": Scheme(W("int7")),
    "w6a6": Scheme(W("int6"), A("int6")),
    "w4a8": Scheme(W("int4-g32"), A("int8")),
    "w4a4": Scheme(W("int4"), A("int4")),
    "w8a8-g32": Scheme(W("int8-g32"), A("int8-g32")),
}
STATIC = Levels(torch.tensor([[3.0 / 128]]))  # exact in bfloat16
STATIC_ASYMMETRIC = Levels(torch.tensor([[3.0 / 128]]), torch.tensor([[-17.0]]))


def tiny_llama(dtype: torch.dtype, hidden: int = 128) -> LlamaForCausalLM:
    """Two layers; ``hidden`` 128 so that groups of 128 fit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # .to(dtype) would round the rotary table too
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0 if "norm" not in name else 1, 0.1)
    return model


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def static_levels(scheme: Scheme) -> Levels | None:
    if scheme.activations is None or scheme.activations.dynamic:
        return None
    return STATIC if scheme.activations.symmetric else STATIC_ASYMMETRIC


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    levels = scheme.weights.fit(weight, weight.dtype)
    return QuantizedWeight(scheme.weights.quantize(weight, levels), levels, scheme.weights)


def save(model, schemes: dict[str, Scheme], folder) -> dict[str, QuantizedWeight]:
    """Writes ``model`` with some Linears quantized; what was stored, by name."""
    linears = linears_of(model)
    tensors = dict(model.state_dict())
    stored = {name: quantize(linears[name].weight.detach(), scheme) for name, scheme in schemes.items()}
    for name, quantized in stored.items():
        del tensors[f"{name}.weight"]
        packed = pack(quantized, schemes[name], model.dtype, static_levels(schemes[name]))
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    config = model.config.to_dict() | {"quantization_config": quantization_config(schemes, linears)}
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    with CheckpointWriter(folder) as writer:
        writer.add(tensors)
        writer.finish({"config.json": json.dumps(config)})
    return stored


def fake_quantized(model, stored: dict[str, QuantizedWeight], schemes: dict[str, Scheme]):
    """``model`` itself, computing in float what the folder describes."""
    for name, linear in linears_of(model).items():
        if name in stored:
            linear.weight.data = stored[name].dequantize().to(model.dtype)
            grid, levels = schemes[name].activations, static_levels(schemes[name])
            if grid is not None:
                linear.register_forward_pre_hook(lambda _, x, g=grid, s=levels: (g.round_activations(x[0], s),))
    return model


def all_but_head(model, scheme: Scheme) -> dict[str, Scheme]:
    return {name: scheme for name in linears_of(model) if name != "lm_head"}


def reload_and_compare(folder, scheme: Scheme, dtype: torch.dtype) -> tuple[float, float]:
    """Saves, reloads and compares: (distance of their logits from ours, what rounding activations does to ours)."""
    model = tiny_llama(dtype)
    schemes = all_but_head(model, scheme)
    stored = save(model, schemes, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype
    tokens = torch.randint(128, (2, 12))
    with torch.no_grad():
        theirs = loaded(tokens).logits.float()  # the first forward decompresses
        plain = fake_quantized(copy.deepcopy(model), stored, dict.fromkeys(schemes, Scheme(scheme.weights)))
        exact = plain(tokens).logits.float()
        ours = fake_quantized(model, stored, schemes)(tokens).logits.float()
    for name, linear in linears_of(loaded).items():
        if name in stored:
            assert torch.equal(linear.weight, stored[name].dequantize().to(dtype)), name
    assert loaded.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
    size = exact.norm()
    return float((theirs - ours).norm() / size), float((ours - exact).norm() / size)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_transformers_reads_back_exactly_our_weights_and_logits(tmp_path, scheme):
    distance, _ = reload_and_compare(tmp_path / "out", scheme, torch.float32)
    assert distance < 1e-5


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "w8a8-asym", "w4a16-g128", "w4a16-g32-asym", "w3a16-g32"])
def test_transformers_reads_back_exactly_our_bfloat16_weights(tmp_path, name):
    distance, rounding = reload_and_compare(tmp_path / "out", SCHEMES[name], torch.bfloat16)
    # Activations may differ by a step here and there (next test), which is no more than rounding them did.
    assert distance <= (1e-5 if SCHEMES[name].activations is None else 2 * rounding)


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8-tensor", "w8a8-static", "w8a8-static-asym", "w8a8-asym", "w6a6", "w4a4"]
)
def test_library_rounds_activations_as_the_grid_does_within_a_step_in_bfloat16(name):
    """It divides by the scale in the activation's dtype, the grid (and int8 kernels) in float32."""
    scheme = SCHEMES[name]
    for dtype, steps in ((torch.float32, 0), (torch.bfloat16, 1)):
        config = QuantizationConfig.model_validate(quantization_config({"a": scheme}, ["a"]))
        model = nn.Sequential(OrderedDict(a=nn.Linear(256, 8, dtype=dtype)))
        apply_quantization_config(model, config)
        levels = static_levels(scheme)
        if levels is not None:
            model.a.input_scale.data = levels.scale.reshape(1).to(dtype)
            if levels.zero_point is not None:
                model.a.input_zero_point.data = levels.zero_point.reshape(1).to(torch.int8)
        x = torch.randn(2, 50, 256).to(dtype)
        theirs = forward_quantize(model.a, x, "input", model.a.quantization_scheme.input_activations)
        ours = scheme.activations.round_activations(x, levels)
        step = (levels or scheme.activations.fit(x.reshape(-1, 256), dtype)).scale.max()
        last_bits = x.abs().max() / 64  # of a bfloat16 result and of its scale
        assert (theirs.float() - ours.float()).abs().max() <= steps * (step + last_bits)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_library_decompresses_our_tensors_to_our_values(scheme):
    weight = torch.randn(40, 256)
    quantized = quantize(weight, scheme)
    tensors = pack(quantized, scheme, torch.float32, static_levels(scheme))
    config = QuantizationConfig.model_validate(quantization_config({"a": scheme}, ["a"]))
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    assert torch.equal(compressor.decompress(tensors, group)["weight"], quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_unpack_inverts_pack(scheme):
    quantized = quantize(torch.randn(1030, 256).to(torch.bfloat16), scheme)
    tensors = pack(quantized, scheme, torch.bfloat16, static_levels(scheme))
    back = unpack(tensors, scheme)
    assert torch.equal(back.codes, quantized.codes)
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.dequantize(), quantized.dequantize())
    levels = unpack_activations(tensors)
    assert (levels is None) == (static_levels(scheme) is None)
    if levels is not None:
        assert torch.equal(levels.scale, static_levels(scheme).scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 40, 129])
def test_every_code_survives_packing_at_any_width(bits, columns):
    grid = QuantGrid(bits=bits)
    codes = torch.randint(grid.range[0], grid.range[1] + 1, (3, columns), dtype=torch.int8)
    codes[0, :2] = torch.tensor(grid.range)
    tensors = pack(QuantizedWeight(codes, Levels(torch.ones(3, 1)), grid), Scheme(grid), torch.float32)
    assert tensors["weight_packed"].shape == (3, -(-columns * bits // 32))
    assert torch.equal(unpack(tensors, Scheme(grid)).codes, codes)


def test_four_bit_codes_lie_in_eights_with_the_lowest_bits_first():
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7]], dtype=torch.int8)
    grid = QuantGrid(bits=4)
    word = pack(QuantizedWeight(codes, Levels(torch.ones(1, 1)), grid), Scheme(grid), torch.float32)["weight_packed"]
    assert int(word) & 0xFFFFFFFF == sum((int(q) + 8) << (4 * j) for j, q in enumerate(codes[0]))


def test_symmetric_schemes_store_no_zero_point():
    for scheme in SCHEMES.values():
        names = pack(quantize(torch.randn(8, 256), scheme), scheme, torch.float32, static_levels(scheme)).keys()
        assert ("weight_zero_point" in names) == (not scheme.weights.symmetric)
        static = static_levels(scheme) is not None
        assert ("input_scale" in names) == static
        assert ("input_zero_point" in names) == (static and not scheme.activations.symmetric)


def test_config_has_the_documented_shape():
    config = quantization_config({"a": SCHEMES["w8a8"]}, ["a", "lm_head"])
    expected = json.loads("""
{"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
 "ignore": ["lm_head"], "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {},
 "config_groups": {"group_0": {"targets": ["Linear"], "format": "int-quantized", "output_activations": null,
   "weights": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "group_size": null,
     "dynamic": false},
   "input_activations": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "group_size": null,
     "dynamic": true}}}}""")
    assert config.pop("version")
    assert json.loads(json.dumps(config)) == expected


def test_mixed_schemes_each_reach_their_own_matrices(tmp_path):
    model = tiny_llama(torch.float32)
    names = [name for name in linears_of(model) if name != "lm_head"]
    kinds = [SCHEMES["w8a8"], SCHEMES["w4a16-g32"], SCHEMES["w4a16-g32-asym"]]
    schemes = {name: kinds["mlp" in name] for name in names if "k_proj" not in name}
    schemes["model.layers.1.mlp.down_proj"] = kinds[2]
    stored = save(model, schemes, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert schemes_of(config, linears_of(model)) == schemes
    loaded, tokens = load(tmp_path / "out", runtime="dense"), torch.randint(128, (1, 8))
    with torch.no_grad():
        theirs, ours = loaded(tokens).logits, fake_quantized(model, stored, schemes)(tokens).logits
    assert torch.allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_schemes_read_back_as_written(scheme):
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("up", "down")] + ["lm_head"]
    schemes = dict.fromkeys(names[:-1], scheme)
    assert schemes_of(quantization_config(schemes, names), names) == {n: scheme.stored() for n in names[:-1]}


def test_patterns_match_the_names_they_stand_for_and_no_others():
    every = [f"model.layers.{i}.{kind}_proj" for i in range(12) for kind in ("q", "up", "down")] + ["lm_head"]
    wanted = [n for n in every if "q_" in n] + ["model.layers.3.up_proj", "lm_head"]
    patterns = name_patterns(wanted, every)
    assert len(patterns) == 3
    assert [n for n in every if any(match_name(n, p) for p in patterns)] == [n for n in every if n in wanted]


def test_only_linear_modules_can_be_stored_quantized():
    assert unsupported(nn.Linear) == ""
    assert "Conv1D" in unsupported(Conv1D)
    assert "Conv2d" in unsupported(nn.Conv2d)


def test_packed_zero_points_are_avoided_since_readers_refuse_them():
    scheme = SCHEMES["w4a16-g32-asym"]
    assert (storage_format(scheme), storage_bits(scheme)) == ("int-quantized", 8)
    assert re.search("4-bit.* 8 bits", storage_note(scheme))
    assert storage_note(SCHEMES["w4a16-g32"]) == storage_note(SCHEMES["w8a8"]) == ""


def test_pack_refuses_what_would_not_read_back():
    scheme = Scheme(QuantGrid(bits=4))
    codes = torch.zeros(2, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="not exact"):
        pack(QuantizedWeight(codes, Levels(torch.full((2, 1), 0.1)), scheme.weights), scheme, torch.bfloat16)
    with pytest.raises(ValueError, match="outside"):
        pack(QuantizedWeight(codes + 8, Levels(torch.ones(2, 1)), scheme.weights), scheme, torch.float32)
    with pytest.raises(ValueError, match="under a scheme"):
        pack(QuantizedWeight(codes, Levels(torch.ones(2, 1)), QuantGrid(bits=8)), scheme, torch.float32)
    levels = Levels(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="zero points"):
        pack(QuantizedWeight(codes, levels, scheme.weights), scheme, torch.float32)
    static = Scheme(scheme.weights, A("int8-static"))
    with pytest.raises(ValueError, match="activation levels"):
        pack(QuantizedWeight(codes, Levels(torch.ones(2, 1)), scheme.weights), static, torch.float32)


def test_config_refuses_unknown_matrices_and_an_empty_set():
    with pytest.raises(ValueError, match="not a Linear"):
        quantization_config({"b": SCHEMES["w8a8"]}, ["a"])
    with pytest.raises(ValueError, match="no matrix"):
        quantization_config({}, ["a"])


def test_schemes_of_foreign_checkpoints_are_refused_in_one_line():
    with pytest.raises(UserError, match="awq"):
        schemes_of({"quant_method": "awq"}, ["a"])
    with pytest.raises(UserError, match="unreadable"):
        schemes_of({"quant_method": "gptq"}, ["a"])  # says nothing of bits
    config = quantization_config({"a": SCHEMES["w8a8"]}, ["a"])
    config["config_groups"]["group_0"]["format"] = config["format"] = "marlin-24"
    with pytest.raises(UserError, match="marlin-24"):
        schemes_of(config, ["a"])
