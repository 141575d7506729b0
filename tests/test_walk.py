"""The walk: one forward of each sample, compressed predecessors, the same result suspended or replayed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.lane import _micro_batches
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.recipe import Recipe, Stage
from llmcompress.walk import CompressedBlock, Walk
from tests.architectures import CONFIGS, tiny_folder

TOKENS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
JOINT = {
    "stages": [{"prune": {"sparsity": 0.5}}, {"smooth": {}}, {"quantize": {"weights": "int8", "activations": "int8"}}]
}


def walk(
    path: Path, tree: object = JOINT, replay: bool = False, dtype: torch.dtype = torch.float32
) -> list[CompressedBlock]:
    model = BlockwiseModel(Checkpoint(path), dtype)
    return list(Walk(model, Recipe.from_tree(tree, "test"), TOKENS, replay=replay).run())


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_replay_equals_suspended(model_type: str, propagate: str, tmp_path: Path) -> None:
    path, tree = tiny_folder(tmp_path, model_type), {**JOINT, "propagate": propagate}
    for one, two in zip(walk(path, tree), walk(path, tree, replay=True), strict=True):
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_replay_equals_suspended_in_bfloat16(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "llama", dtype=torch.bfloat16)
    one, two = walk(path, dtype=torch.bfloat16), walk(path, dtype=torch.bfloat16, replay=True)
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for a, b in zip(one, two, strict=True) for n in a.tensors)


def test_every_matrix_multiplies_every_token_once_but_the_last_which_nobody_waits_for(tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(tiny_folder(tmp_path)), torch.float32)
    seen: Counter[str] = Counter()

    def count(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if args[0].shape[:2] != (1, 16):  # the probe
                seen[name] += args[0].numel() // args[0].shape[-1]

        return hook

    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_hook(lambda m, a, o, name=name: count(name)(m, a))
    list(Walk(model, Recipe.from_tree(JOINT, "t"), TOKENS).run())
    assert len(seen) == 13 and set(seen.values()) == {TOKENS.numel()}
    assert "model.layers.1.mlp.down_proj" not in seen


@pytest.mark.parametrize("propagate", ["compressed", "block", "pruned", "dense"])
@pytest.mark.parametrize("replay", [False, True])
def test_no_forward_waits_when_the_walk_has_ended(replay: bool, propagate: str, tmp_path: Path) -> None:
    """One that did would keep what it holds, until the thread that began it looks after it."""
    recipe = Recipe.from_tree(JOINT | {"propagate": propagate}, "test")
    steps = Walk(BlockwiseModel(Checkpoint(tiny_folder(tmp_path)), torch.float32), recipe, TOKENS, replay=replay)
    list(steps.run())
    assert len(steps.lanes[0].everyone) > 1
    assert all(forward.done for lane in steps.lanes for forward in lane.everyone)


def test_each_group_is_calibrated_on_its_compressed_predecessors(tmp_path: Path) -> None:
    """Wanda's mask of the last matrix, computed directly on a model whose other matrices are compressed already."""
    tree = {"stages": [{"prune": {"method": "wanda", "sparsity": 0.5}}]}
    path = tiny_folder(tmp_path)
    finished = walk(path, tree)
    model = BlockwiseModel(Checkpoint(path), torch.float32)
    model.load_rest(head=True)
    for index, block in enumerate(finished):
        model.load_block(index)
        for name, value in block.tensors.items():
            model.model.get_parameter(name).data.copy_(value)
    last = "model.layers.1.mlp.down_proj"
    caught: list[torch.Tensor] = []
    model.model.get_submodule(last).register_forward_pre_hook(lambda m, a: caught.append(a[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in micro_batches(TOKENS):
            model.model(batch)
    dense = Checkpoint(path).read([last + ".weight"])[last + ".weight"].double()
    score = dense.abs() * torch.cat(caught).double().norm(dim=0)
    kept = score.argsort(dim=1)[:, 32:].sort(dim=1).values
    mask = model.model.get_submodule(last).weight != 0
    assert torch.equal(mask.nonzero()[:, 1].view(-1, 32), kept)


def test_later_stages_never_refill_a_zero(tmp_path: Path) -> None:
    for block in walk(
        tiny_folder(tmp_path),
        {"stages": [{"prune": {"sparsity": "2:4"}}, {"smooth": {}}, {"quantize": {"weights": "int4-g8-asym"}}]},
    ):
        for matrix in block.report.matrices:
            assert matrix.sparsity >= 0.5


def test_excluded_readers_are_scaled_along_and_stay_dense(tmp_path: Path) -> None:
    tree = {**JOINT, "targets": {"include": ["*"], "exclude": ["*.k_proj"]}}
    path = tiny_folder(tmp_path)
    first = walk(path, tree)[0]
    name = "model.layers.0.self_attn.k_proj"
    before, after = Checkpoint(path).read([name + ".weight"])[name + ".weight"], first.tensors[name + ".weight"]
    assert name not in first.schemes and after.dtype == torch.float32
    scale = (after / before).median(dim=0).values
    torch.testing.assert_close(after, before * scale, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(scale, torch.ones(32))


def test_all_equal_parts_of_an_untouched_block_are_the_input_bytes(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, dtype=torch.bfloat16)
    tree = {"stages": [{"prune": {"sparsity": 0.5}}], "targets": {"include": ["*.down_proj"]}}
    source = Checkpoint(path)
    for block in walk(path, tree):
        for name, value in block.tensors.items():
            assert value.dtype == torch.bfloat16
            if "down_proj" not in name:
                assert torch.equal(value, source.read([name])[name])


@dataclass(frozen=True)
class Recording(Method):
    """Halves the weights and keeps the statistics it was shown."""

    needs = frozenset({"gram", "cross"})
    stage = "prune"
    shown: dict[str, InputStats] = field(default_factory=dict)

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        self.shown[group.name] = stats
        for matrix in group:
            matrix.weight = matrix.weight / 2
        return stats


@torch.no_grad()
def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: caught.append(a[0].flatten(0, -2)))
    model(TOKENS)
    hook.remove()
    return torch.cat(caught).double()


@pytest.mark.parametrize("replay", [False, True])
def test_dense_lane_pairs_the_dense_models_rows_with_the_compressed_ones(replay: bool, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    method = Recording()
    recipe = Recipe("recording", (Stage("prune", "recording", method, {}),))
    finished = list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), recipe, TOKENS, replay=replay).run())
    dense = AutoModelForCausalLM.from_pretrained(path)
    compressed = AutoModelForCausalLM.from_pretrained(path)
    for block in finished:
        compressed.load_state_dict(block.tensors, strict=False)
    for name, stats in method.shown.items():
        before, after = inputs_of(dense, name), inputs_of(compressed, name)
        torch.testing.assert_close(stats.gram.double(), after.T @ after / len(after), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.cross.double(), before.T @ after / len(after), rtol=1e-4, atol=1e-5)
    assert len(method.shown) == 8


def test_propagating_dense_inputs_calibrates_every_group_on_the_dense_model(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    method = Recording()
    recipe = Recipe("recording", (Stage("prune", "recording", method, {}),), propagate="dense")
    finished = list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), recipe, TOKENS).run())
    dense = AutoModelForCausalLM.from_pretrained(path)
    for name, stats in method.shown.items():
        rows = inputs_of(dense, name)
        torch.testing.assert_close(stats.gram.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(finished[0].tensors[name], dense.get_parameter(name) / 2)


def test_dense_weights_that_the_tokens_are_past_are_freed(tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(tiny_folder(tmp_path)), torch.float32)
    recipe = Recipe.from_tree({"stages": JOINT["stages"][:1], "propagate": "dense"}, "test")
    for finished in Walk(model, recipe, TOKENS).run():
        stored = {name: tensor for name, tensor in finished.tensors.items() if "proj" in name}
        assert len(stored) == 7
        assert all(model.model.get_parameter(n).data_ptr() == tensor.data_ptr() for n, tensor in stored.items())


@pytest.mark.parametrize("replay", [False, True])
def test_propagating_the_block_calibrates_on_dense_siblings_behind_compressed_blocks(
    replay: bool, tmp_path: Path
) -> None:
    path = tiny_folder(tmp_path)
    method = Recording()
    recipe = Recipe("recording", (Stage("prune", "recording", method, {}),), propagate="block")
    object.__setattr__(method, "needs", frozenset({"gram"}))
    finished = list(Walk(BlockwiseModel(Checkpoint(path), torch.float32), recipe, TOKENS, replay=replay).run())
    model = AutoModelForCausalLM.from_pretrained(path)
    for index, block in enumerate(finished):
        for name in [n for n in method.shown if f"layers.{index}." in n]:
            rows = inputs_of(model, name)
            torch.testing.assert_close(
                method.shown[name].gram.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
            )
        model.load_state_dict(block.tensors, strict=False)


@pytest.mark.parametrize("mode", ["block", "dense"])
def test_propagation_decides_nothing_about_the_first_group_and_something_about_later_blocks(
    mode: str, tmp_path: Path
) -> None:
    path = tiny_folder(tmp_path)
    plain = walk(path, JOINT)
    other = walk(path, {**JOINT, "propagate": mode})
    first = "model.layers.0.self_attn.q_proj.weight"
    later = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(plain[0].tensors[first], other[0].tensors[first])
    assert not torch.equal(plain[1].tensors[later], other[1].tensors[later])


@pytest.mark.parametrize("replay", [False, True])
def test_propagating_pruned_outputs_rounds_what_the_recipe_without_rounding_gives(replay: bool, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    rounded = walk(path, {**JOINT, "propagate": "pruned"}, replay)
    unrounded = walk(path, {"stages": JOINT["stages"][:2]})
    seen = 0
    for one, two in zip(rounded, unrounded, strict=True):
        assert one.schemes
        for name in one.schemes:
            grid, weight = QuantGrid(), two.tensors[f"{name}.weight"]
            expected = grid.quantize(weight, grid.fit(weight, torch.float32))
            assert torch.equal(one.tensors[f"{name}.weight"].int(), expected.int())
            seen += 1
        others = [name for name in two.tensors if name.removesuffix(".weight") not in one.schemes]
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in others)
    assert seen == 14


def test_smoothing_is_stored_though_dense_inputs_are_propagated(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    first = walk(path, {"stages": [{"smooth": {}}], "propagate": "dense"})
    model = AutoModelForCausalLM.from_pretrained(path)
    smoothed = AutoModelForCausalLM.from_pretrained(path)
    for block in first:
        smoothed.load_state_dict(block.tensors, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(smoothed(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-4)
    assert not torch.equal(
        smoothed.model.layers[1].input_layernorm.weight, model.model.layers[1].input_layernorm.weight
    )


def test_steps_that_need_no_statistics_are_given_only_the_rows_that_errors_are_measured_on(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    many = TOKENS.repeat(20, 1)  # 2880 tokens, 24 a row
    model = BlockwiseModel(Checkpoint(path), torch.float32)
    rounding = {"stages": [{"quantize": {"weights": "int8", "activations": "int8"}}]}
    fixed = {"stages": [{"quantize": {"weights": "int8", "activations": "int8-static"}}]}
    assert Walk(model, Recipe.from_tree(rounding, "t"), many).tokens.numel() == 264
    assert Walk(model, Recipe.from_tree(fixed, "t"), many).tokens.numel() == 2880


def test_each_block_has_the_ratio_that_is_given_to_it(tmp_path: Path) -> None:
    blocks = len(walk(tiny_folder(tmp_path), {"stages": [{"quantize": {"weights": "int8"}}]}))
    ratios = [0.7, 0.3] + [0.5] * (blocks - 2)
    stage = {"prune": {"method": "sparsegpt", "sparsity": 0.5, "ratios": ratios}}
    finished = walk(tiny_folder(tmp_path), {"stages": [stage]})
    for block, ratio in zip(finished, ratios, strict=True):
        for matrix in block.report.matrices:
            assert matrix.sparsity == pytest.approx(ratio, abs=1 / matrix.weights)


def test_ramp_grows_over_the_blocks_and_keeps_the_model_total(tmp_path: Path) -> None:
    stage = {"prune": {"method": "sparsegpt", "sparsity": 0.5, "ramp": 0.2}}
    finished = walk(tiny_folder(tmp_path), {"stages": [stage]})
    zeros = [sum(m.sparsity * m.weights for m in block.report.matrices) for block in finished]
    weights = [sum(m.weights for m in block.report.matrices) for block in finished]
    ratios = [z / w for z, w in zip(zeros, weights, strict=True)]
    assert ratios == sorted(ratios)
    assert ratios[-1] - ratios[0] == pytest.approx(0.2 * (1 - 1 / len(finished)), abs=2e-3)
    assert abs(sum(zeros) - sum(weights) / 2) <= 7 * len(finished) / 2  # each matrix is rounded to a whole number


@pytest.mark.parametrize(("hidden", "tokens"), [(64, 2048), (512, 2048), (1024, 1024), (2048, 512), (8192, 512)])
def test_micro_batches_of_wide_models_hold_fewer_tokens(hidden: int, tokens: int) -> None:
    model: Any = SimpleNamespace(model=SimpleNamespace(config=PretrainedConfig(hidden_size=hidden)))
    batches = _micro_batches(model, torch.zeros(40, 128, dtype=torch.int64))
    assert {len(batch) * 128 for batch in batches[:-1]} == {tokens}
    assert sum(len(batch) for batch in batches) == 40
    assert len(_micro_batches(model, torch.zeros(3, 4096, dtype=torch.int64))) == 3  # never less than a row
