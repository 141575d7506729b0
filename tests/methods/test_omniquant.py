"""Laws of OmniQuant: what is learned lowers the block's output error, and the transformation alone changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.core.block import BlockView
from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.core.straight_through import round_through
from llmcompress.errors import UserError
from llmcompress.export.quantized import unpack
from llmcompress.methods.omniquant import LearnedQuant, OmniQuant
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe, Stage
from llmcompress.walk import CompressedBlock, Walk
from tests.architectures import tiny_folder, tiny_model

TOKENS = torch.randint(3, 96, (10, 24), generator=torch.Generator().manual_seed(1))
W4, A6 = QuantGrid.parse_weights("int4-g8"), QuantGrid.parse_activations("int6")


def outlier_folder(path: Path, model_type: str = "llama") -> Path:
    """A tiny model whose norms write some channels 30 times too large, for weights 30 times too small."""
    model = tiny_model(model_type)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::7] *= 30
            layer.post_attention_layernorm.weight[::7] *= 30
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                layer.get_submodule(name).weight[:, ::7] /= 30
    model.save_pretrained(path)
    return path


def walk(path: Path, method: Method, replay: bool = False) -> list[CompressedBlock]:
    recipe = Recipe("omniquant", (Stage("quantize", "omniquant", method, {}),))
    return list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), recipe, TOKENS, replay=replay).run())


def figures(block: CompressedBlock) -> dict[str, float]:
    return block.report.groups[0].figures


@pytest.mark.parametrize(
    ("weights", "activations"), [("int4", "int6"), ("int4-asym", "int6-static-asym"), ("int3-tensor", None)]
)
def test_learning_never_loses_and_gains_on_a_block_with_outliers(
    weights: str, activations: str | None, tmp_path: Path
) -> None:
    inputs = activations and QuantGrid.parse_activations(activations)
    blocks = walk(outlier_folder(tmp_path), OmniQuant(QuantGrid.parse_weights(weights), inputs))
    errors = [(figures(block)["block_error_learned"], figures(block)["block_error_start"]) for block in blocks]
    assert all(learned <= start for learned, start in errors)
    assert any(learned < 0.95 * start for learned, start in errors)


@dataclass(frozen=True)
class OnlySmooth(Method):
    """Learns as OmniQuant does, and applies the transformation without any rounding."""

    inner: OmniQuant
    learned: LearnedQuant | None = None
    stage = "quantize"
    smooths = True
    needs = OmniQuant(W4).needs
    batch = 1

    def for_block(self, view: BlockView) -> Method:
        return replace(self, learned=self.inner.for_block(view))

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        found = self.learned.learned[group.name]
        if found.scale is not None:
            group.smooth(found.scale, stats)
        return stats


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma", "opt", "gpt2"])
def test_the_learned_transformation_alone_leaves_the_model_as_it_was(model_type: str, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, model_type)
    smoothed = AutoModelForCausalLM.from_pretrained(path)
    before = smoothed(TOKENS).logits
    blocks = walk(path, OnlySmooth(OmniQuant(W4, A6)))
    source = Checkpoint(path)
    changed = 0
    for block in blocks:
        smoothed.load_state_dict(block.tensors, strict=False)
        changed += sum(not torch.equal(t, source.read([name])[name]) for name, t in block.tensors.items())
    assert changed >= 8
    assert (smoothed(TOKENS).logits - before).norm() < 1e-4 * before.norm()


class OutputError(nn.Module):
    """‖compressed block − dense block‖² over all rows, both computed by plain transformers modules."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.dense, self.compressed = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))

    @torch.no_grad()
    def of(self, block: CompressedBlock, activations: QuantGrid, index: int = 0) -> float:
        layer = self.compressed.model.layers[index]
        prefix = f"model.layers.{index}."
        for name, scheme in block.schemes.items():
            assert scheme.activations == activations
            linear = self.compressed.get_submodule(name)
            codes, scale = block.tensors[f"{name}.weight_packed"], block.tensors[f"{name}.weight_scale"]
            assert codes.dtype == torch.int32 and scale.dim() == 2
            linear.register_forward_pre_hook(lambda m, a: (activations.round_activations(a[0]),))
        for name, scheme in block.schemes.items():
            parts = {k.removeprefix(name + "."): v for k, v in block.tensors.items() if k.startswith(name + ".")}
            self.compressed.get_submodule(name).weight.copy_(unpack(parts, scheme).dequantize())
        for name, value in block.tensors.items():
            if "layernorm" in name:
                layer.get_parameter(name.removeprefix(prefix)).copy_(value)
        outputs = []
        for model in (self.dense, self.compressed):
            caught: list[Tensor] = []
            hook = model.model.layers[index].register_forward_hook(lambda m, a, out, c=caught: c.append(out))
            model(TOKENS)
            hook.remove()
            outputs.append(caught[0] if isinstance(caught[0], Tensor) else caught[0][0])
        return float((outputs[1] - outputs[0]).square().sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_learned_block_is_no_worse_than_smoothing_and_rounding(seed: int, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, seed=seed)
    grids = {"weights": "int4-g8", "activations": "int6"}
    start = Recipe.from_tree({"stages": [{"smooth": {"alpha": 0.5}}, {"quantize": grids}]}, "start")
    rounded = next(Walk(BlockwiseModel(Checkpoint(path), torch.float32), start, TOKENS).run())
    learned = walk(path, OmniQuant(W4, A6))[0]
    assert OutputError(path).of(learned, A6) < OutputError(path).of(rounded, A6)


def test_same_rows_same_bytes_suspended_or_replayed(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    method = OmniQuant(W4, A6, epochs=2)
    for one, two, three in zip(walk(path, method), walk(path, method), walk(path, method, replay=True), strict=True):
        for name in one.tensors:
            assert torch.equal(one.tensors[name], two.tensors[name]), name
            assert torch.equal(one.tensors[name], three.tensors[name]), name


def test_learning_leaves_the_waiting_block_as_it_was(tmp_path: Path) -> None:
    """A method that learns and then does nothing writes the input's bytes."""

    @dataclass(frozen=True)
    class Nothing(OnlySmooth):
        def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
            return stats

    path = tiny_folder(tmp_path)
    source = Checkpoint(path)
    for block in walk(path, Nothing(OmniQuant(W4, A6, epochs=1))):
        for name, value in block.tensors.items():
            assert torch.equal(value, source.read([name])[name])


@torch.no_grad()
def test_aiming_at_the_dense_model_brings_the_last_block_closer_to_it(tmp_path: Path) -> None:
    """Its aim is what the dense model's block returns there: the start's error is the whole distance from it."""
    path = tiny_folder(tmp_path)
    near, far = (walk(path, OmniQuant(W4, target=t))[1] for t in ("compressed", "dense"))
    assert figures(far)["block_error_start"] > figures(near)["block_error_start"]
    assert figures(far)["block_error_learned"] <= figures(far)["block_error_start"]


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "smoothquant-w8a8", "gptq-w4a16", "wanda-50", "jsq", "awq-w4a16"])
def test_methods_that_see_groups_alone_are_the_same_for_every_block(recipe: str) -> None:
    for method in Recipe.load(recipe).methods:
        assert method.for_block(None) is method


@pytest.mark.parametrize("grid", ["int4", "int4-g8", "int3-g4-asym", "int8-tensor", "int6-tensor-asym"])
def test_rounding_straight_through_has_the_values_of_rounding_and_the_gradient_of_none(grid: str) -> None:
    parsed = QuantGrid.parse_weights(grid)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    levels = parsed.fit(x.detach())
    rounded = round_through(parsed, x, levels)
    assert torch.equal(rounded.detach(), parsed.round(x.detach(), levels))
    rounded.sum().backward()
    inside = (parsed.quantize(x.detach(), levels) > parsed.range[0]) & (
        parsed.quantize(x.detach(), levels) < parsed.range[1]
    )
    torch.testing.assert_close(x.grad[inside], torch.ones_like(x.grad[inside]))


def test_a_block_seen_through_the_view_is_the_block(tmp_path: Path) -> None:
    """Run with its own weights it returns what transformers does, and weights and inputs given reach it."""
    path = tiny_folder(tmp_path)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @dataclass(frozen=True)
    class Look(OnlySmooth):
        batch = 4

        def for_block(self, view: BlockView) -> Method:
            zero = {n: torch.zeros_like(w) for g in view.groups for n, w in g.weights.items()}
            nothing = {g.name: torch.zeros_like for g in view.groups}
            seen.append((view.run(0), view.run(0, zero), view.run(0, {}, nothing)))
            assert view.batches == 3 and torch.equal(view.aim(0), seen[-1][0])
            return self

        def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
            return stats

    walk(path, Look(OmniQuant(W4)))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        states = model.model(TOKENS[:4], output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[0][0], states[1], rtol=1e-4, atol=1e-5)
    for plain in seen[0][1:]:  # only the residual stream is left
        torch.testing.assert_close(plain, states[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"clips": False}, {"clips": False, "alpha": None}, {}])
def test_inputs_that_no_norm_writes_leave_only_clipping_to_learn(options: dict[str, object], tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "llama")
    method = replace(OmniQuant(W4, A6), **options)
    only = Recipe("omniquant", (Stage("quantize", "omniquant", method, {}),), include=("*.down_proj",))
    for block in Walk(BlockwiseModel(Checkpoint(path), torch.float32), only, TOKENS).run():
        assert (figures(block).get("epochs", 0) > 0) == method.clips


@pytest.mark.parametrize("options", [{"epochs": 0}, {"samples": 0}, {"batch": 0}, {"scales": False, "clips": False}])
def test_options_that_leave_nothing_to_learn_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        replace(OmniQuant(W4), **options)
