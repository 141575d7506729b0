"""Rounded outputs of q, k and v: the same in calibration, in our evaluation and in the folder that others load."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.api import Options, compress
from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import rounded_activations
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.rtn import RTN
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe, Stage
from llmcompress.walk import Walk
from tests.architectures import tiny_folder

TOKENS = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(5))
W8A8 = {"weights": "int8", "activations": "int8"}


def recipe(outputs: list[str], **more: object) -> Recipe:
    return Recipe.from_tree({"stages": [{"quantize": {**W8A8, "quantize_outputs": outputs, **more}}]}, "outputs")


def per_token(x: Tensor) -> Tensor:
    """Signed 8-bit rounding of each row, written out."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def whole(folder: Path) -> nn.Module:
    """The folder in our own reading, with its roundings in place when `rounded_activations` is open."""
    model = BlockwiseModel(Checkpoint(folder), torch.float32)
    model.load_rest(head=True)
    for index in range(len(model.blocks)):
        model.load_block(index)
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_transformers_rounds_the_same_outputs_on_reload(
    method: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = Options(calibration=str(text), samples=4, length=32, evaluate=False)
    report = compress(checkpoint, recipe(["q", "k", "v"], method=method), tmp_path / "out", options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs(TOKENS)  # the first forward decompresses
    model = whole(tmp_path / "out")
    with rounded_activations(model):
        ours = model.model(TOKENS).logits
    torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)
    model.schemes = {name: type(s)(s.weights, s.activations) for name, s in model.schemes.items()}
    with rounded_activations(model):
        assert (model.model(TOKENS).logits - ours).norm() > 1e-3 * ours.norm()
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    rounded = [g["targets"] for g in groups.values() if g["output_activations"]]
    assert sorted(target for targets in rounded for target in targets) == [
        rf"re:model.layers.\d+.self_attn.{name}_proj$" for name in "kqv"
    ]
    assert any("outputs" in warning for warning in report.warnings)


@dataclass(frozen=True)
class Recording(Method):
    """Rounds, and keeps the rows that it was shown."""

    needs = frozenset({"rows"})
    stage = "quantize"
    rounding: RTN
    shown: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        self.shown[group.name] = torch.cat([x.clone() for x in stats.rows])
        return self.rounding.apply(group, stats)


@torch.no_grad()
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("propagate", ["compressed", "block", "dense"])
def test_calibration_sees_rounded_outputs_where_it_sees_compressed_matrices(
    propagate: str, replay: bool, tmp_path: Path
) -> None:
    path = tiny_folder(tmp_path)
    activations = QuantGrid.parse_activations("int8")
    method = Recording(RTN(QuantGrid(), activations, ("q", "*.v_proj")))
    steps = Recipe("r", (Stage("quantize", "recording", method, {}),), propagate=propagate)
    list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), steps, TOKENS, replay=replay).run())
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        if propagate == "dense":
            continue
        if propagate == "compressed" or ".0." in name:  # block 1 is calibrated on its own matrices while they are dense
            module.weight.copy_(QuantGrid().round(module.weight, QuantGrid().fit(module.weight)))
        module.register_forward_pre_hook(lambda m, a: (per_token(a[0]),))
        if "q_proj" in name or "v_proj" in name:
            module.register_forward_hook(lambda m, a, out: per_token(out))
    name = "model.layers.1.self_attn.o_proj"
    caught: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: caught.append(a[0].flatten(0, -2)), prepend=True)
    model(TOKENS)
    torch.testing.assert_close(method.shown[name], caught[0], rtol=1e-3, atol=1e-3)


def test_a_name_that_stands_for_no_quantized_linear_is_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text), samples=4, length=32, evaluate=False)
    for outputs in (["q", "*.query"], ["*.embed_tokens"]):
        with pytest.raises(UserError, match="quantize_outputs: no quantized Linear"):
            compress(checkpoint, recipe(outputs), tmp_path / "out", options)
    excluded = Recipe.from_tree({**recipe(["q"]).to_tree(), "targets": {"exclude": ["*.q_proj"]}}, "r")
    with pytest.raises(UserError, match="q_proj"):
        compress(checkpoint, excluded, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("activations", [None, "int8-static", "int8-tensor", "int8-g8"])
def test_outputs_need_a_dynamic_grid_per_token(activations: str | None) -> None:
    grid = activations and QuantGrid.parse_activations(activations)
    for method in (RTN, GPTQ):
        with pytest.raises(UserError, match="per token"):
            method(QuantGrid(), grid, quantize_outputs=("q",))


def test_short_names_and_patterns_mean_the_same(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    blocks = [
        list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), recipe(names), TOKENS).run())
        for names in (["q", "k", "v"], ["*.[qkv]_proj"], ["*q_proj", "*k_proj", "*v_proj"])
    ]
    assert blocks[0][1].schemes == blocks[1][1].schemes == blocks[2][1].schemes
    assert {n.rpartition(".")[2] for n, s in blocks[0][1].schemes.items() if s.outputs} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
