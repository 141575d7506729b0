"""The scales of keys and values are what transformers' own cache holds, and transformers reads them back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmcompress import api
from llmcompress.errors import UserError
from llmcompress.key_values import key_value_scales
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe
from tests.export.test_quantized import tiny_llama

TREE = {"kv_cache": "fp8", "stages": [{"quantize": {"method": "rtn", "weights": "fp8", "activations": "fp8"}}]}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_llama(torch.float32).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(1))


def test_scales_span_what_a_cache_holds(dense: Path, tokens: torch.Tensor) -> None:
    scales = key_value_scales(BlockwiseModel(Checkpoint(dense), torch.float32), tokens)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(dense)(tokens, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        name = f"model.layers.{index}.self_attn."
        assert torch.allclose(scales[name + "k_scale"] * 448, layer.keys.abs().amax(), rtol=1e-5)
        assert torch.allclose(scales[name + "v_scale"] * 448, layer.values.abs().amax(), rtol=1e-5)
    assert len(scales) == 2 * len(cache.layers)


def test_transformers_rounds_keys_and_values_by_the_stored_scales(
    dense: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    save_file({"input_ids": tokens}, tmp_path / "rows.safetensors")
    options = api.Options(calibration=str(tmp_path / "rows.safetensors"), samples=3, length=20, evaluate=False)
    report = api.compress(dense, Recipe.from_tree(TREE, "kv"), tmp_path / "out", options)
    assert "the evaluation does not round keys and values" in report.warnings
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scales = key_value_scales(BlockwiseModel(Checkpoint(dense), torch.float32), tokens)
    with torch.no_grad():
        cache = loaded(tokens, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        attention = loaded.model.layers[index].self_attn
        for kind, held in (("k", layer.keys), ("v", layer.values)):
            scale = scales[f"model.layers.{index}.self_attn.{kind}_scale"]
            assert torch.equal(getattr(attention, f"{kind}_scale").flatten(), scale)
            codes = held / scale
            assert torch.allclose(codes.to(torch.float8_e4m3fn).float(), codes, rtol=1e-4)


@pytest.mark.parametrize(
    "tree", [TREE | {"kv_cache": "int8"}, {"kv_cache": "fp8", "stages": [{"prune": {"sparsity": 0.5}}]}]
)
def test_what_cannot_be_stored_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(UserError, match="kv_cache"):
        Recipe.from_tree(tree, "r")


def test_a_recipe_keeps_its_cache() -> None:
    recipe = Recipe.load("fp8-dynamic-kv")
    assert recipe.kv_cache == Recipe.from_tree(recipe.to_tree(), recipe.name).kv_cache == "fp8"
    assert "kv_cache" not in Recipe.load("fp8-dynamic").to_tree()
    assert Recipe.load("fp8-dynamic", ["kv_cache=fp8"]).kv_cache == "fp8"
