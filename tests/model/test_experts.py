"""Experts: each is a matrix of its own, fed with the rows that the router sends it, and stored under its own name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.experts import StackedLinear, visiting_all_experts
from llmcompress.model.groups import map_block
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe, Stage
from llmcompress.starved import MIN_EXPERT_ROWS, Starved
from llmcompress.suspend import gates
from llmcompress.walk import CompressedBlock, Walk
from tests.architectures import ALL, tiny_folder

TOKENS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
#: model type → whether its checkpoints stack the experts
STACKED = {
    "mixtral": False, "qwen2_moe": False, "qwen3_moe": False, "olmoe": False, "deepseek_v2": False,
    "deepseek_v3": False, "nemotron_h": False, "granitemoe": True, "gpt_oss": True, "dbrx": True, "jetmoe": True,
    "llama4_text": True,
}  # fmt: skip
HALF = {"stages": [{"prune": {"method": "magnitude", "sparsity": 0.5}}]}
W4 = {"stages": [{"quantize": {"weights": "int4-g8"}}]}


def loaded(path: Path) -> BlockwiseModel:
    """Whole, in memory."""
    model = BlockwiseModel(Checkpoint(path), torch.float32)
    model.load_rest(head=True)
    for index in range(len(model.blocks)):
        model.load_block(index)
    return model


def walk(
    path: Path, tree: object, tokens: torch.Tensor = TOKENS, **options: bool
) -> tuple[list[CompressedBlock], Walk]:
    model = BlockwiseModel(Checkpoint(path), torch.float32)
    walk = Walk(model, tree if isinstance(tree, Recipe) else Recipe.from_tree(tree, "test"), tokens, **options)
    return list(walk.run()), walk


def experts_of(model: BlockwiseModel) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear) and model.expert_layer(n)}


@pytest.mark.parametrize("model_type", STACKED)
@torch.no_grad()
def test_running_experts_one_by_one_is_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, model_type)
    theirs = AutoModelForCausalLM.from_pretrained(path)(TOKENS, use_cache=False).logits
    model = loaded(path)
    torch.testing.assert_close(model.model(TOKENS, use_cache=False).logits, theirs, rtol=1e-5, atol=1e-5)
    experts = experts_of(model)
    assert len(experts) >= 8
    next(iter(experts.values())).weight.data.mul_(2)
    assert not torch.allclose(model.model(TOKENS, use_cache=False).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", STACKED)
@torch.no_grad()
def test_visiting_every_expert_leaves_the_result_as_it_is(model_type: str, tmp_path: Path) -> None:
    model = loaded(tiny_folder(tmp_path, model_type))
    called: set[str] = set()
    for name, module in experts_of(model).items():
        module.register_forward_hook(lambda m, a, o, name=name: called.add(name))
    plain = model.model(TOKENS[:1, :1], use_cache=False).logits
    assert called < experts_of(model).keys(), "one token reaches every expert"
    with visiting_all_experts(model.model):
        assert torch.equal(model.model(TOKENS[:1, :1], use_cache=False).logits, plain)
    assert called == experts_of(model).keys()


@pytest.mark.parametrize(("model_type", "stacked"), STACKED.items())
def test_names_and_shapes_on_disk_stay_what_they_were(model_type: str, stacked: bool, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, model_type)
    before = Checkpoint(path)
    finished, _ = walk(path, HALF)
    for index, block in enumerate(finished):
        names = BlockwiseModel(before, torch.float32).block_sources(index)
        assert sorted(block.tensors) == sorted(names)
        assert all(tuple(t.shape) == before.tensors[name].shape for name, t in block.tensors.items())
        experts = [m for m in block.report.matrices if re.search(r"\d\.[a-z0-9_.]*\.\d+(\.\w+)?$", m.name)]
        assert all(m.sparsity == 0.5 for m in experts)
    assert bool(BlockwiseModel(before, torch.float32).cuts) == stacked


@pytest.mark.parametrize("model_type", STACKED)
@torch.no_grad()
def test_pruned_experts_are_those_that_transformers_loads(model_type: str, tmp_path: Path) -> None:
    """Half of each row of each expert, by magnitude, done here directly on the stacked tensors or the single ones."""
    path = tiny_folder(tmp_path, model_type)
    finished, _ = walk(path, HALF)
    compressed, dense = loaded(path), loaded(path)
    for index, block in enumerate(finished):
        compressed.fill_block(index, block.tensors, block.schemes)
    after = experts_of(compressed)
    for name, module in experts_of(dense).items():
        half = module.weight.shape[1] // 2
        gone = module.weight.abs().argsort(dim=1, stable=True)[:, :half]
        assert torch.equal(after[name].weight, module.weight.scatter(1, gone, 0.0)), name


@pytest.mark.parametrize("model_type", [name for name, stacked in STACKED.items() if not stacked])
def test_quantized_experts_have_the_names_of_the_checkpoint(model_type: str, tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, model_type)
    before = set(Checkpoint(path).tensors)
    for block in walk(path, W4)[0]:
        packed = {name.removesuffix("_packed") for name in block.tensors if name.endswith(".weight_packed")}
        assert packed <= before
        own = f".{block.report.name.rpartition('.')[2]}."
        assert {name for name in before if re.search(r"experts\.\d+\.", name) and own in name[:20]} <= packed


def test_llama4_is_stored_as_its_readers_want_it(tmp_path: Path) -> None:
    """Stacked while it is dense; a tensor for each expert once it is quantized."""
    path = tiny_folder(tmp_path, "llama4_text")
    (block, _), _ = walk(path, W4)
    names = {n for n in block.tensors if ".experts." in n}
    each = {"weight_packed", "weight_scale", "weight_shape"}
    stems = [f"model.layers.0.feed_forward.experts.{e}.{m}_proj" for e in range(4) for m in ("gate", "up", "down")]
    assert names == {f"{stem}.{ending}" for stem in stems for ending in each}


@pytest.mark.parametrize("replay", [False, True])
def test_an_expert_is_calibrated_on_the_rows_that_reach_it(replay: bool, tmp_path: Path) -> None:
    """Gram matrices and counts, from a plain forward of transformers' module in which the others are compressed."""
    path = tiny_folder(tmp_path, "mixtral")
    shown: dict[str, InputStats] = {}

    class Recording(Method):
        needs, stage = frozenset({"gram"}), "prune"

        def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
            shown[group.name] = stats
            return stats

    recipe = Recipe("recording", (Stage("prune", "recording", Recording(), {}),))
    _, run = walk(path, recipe, TOKENS.repeat(8, 1), replay=replay)
    assert not run.warnings
    theirs = AutoModelForCausalLM.from_pretrained(path)
    caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(theirs.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda m, a, i=index: caught.update({i: (a[0], a[1])}))
    with torch.no_grad():
        theirs(TOKENS.repeat(8, 1))
    for index, (hidden, chosen) in caught.items():
        for expert in range(4):
            rows = hidden[(chosen == expert).any(-1)].double()
            stats = shown[f"model.layers.{index}.mlp.experts.{expert}.gate_proj"]
            assert stats.count == len(rows)
            torch.testing.assert_close(stats.gram.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_replay_equals_suspended_when_micro_batches_reach_different_experts(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "qwen3_moe", num_experts=8)
    tree = {"stages": [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}]}
    rows = TOKENS.repeat(1, 40)[:, :1030]  # one row is a micro-batch
    one, two = walk(path, tree, rows)[0], walk(path, tree, rows, replay=True)[0]
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for a, b in zip(one, two, strict=True) for n in a.tensors)


def test_experts_without_enough_tokens_are_compressed_all_the_same_and_named_once(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "mixtral", num_local_experts=16, num_experts=16)
    tree = {"stages": [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}]}
    finished, run = walk(path, tree, TOKENS[:2, :8])
    for block in finished:
        assert all(m.sparsity == 0.5 for m in block.report.matrices)
        assert len(block.report.matrices) == 4 + 16 * 3
    assert [w.partition(" got fewer")[0] for w in run.warnings] == [
        f"model.layers.{i}.mlp.experts: experts 0–15" for i in range(2)
    ]
    assert all(f"{MIN_EXPERT_ROWS} calibration tokens" in w for w in run.warnings)
    dense, compressed = loaded(path), loaded(path)
    for index, block in enumerate(finished):
        compressed.fill_block(index, block.tensors, block.schemes)
    kept = experts_of(compressed)
    for name, module in experts_of(dense).items():  # what stays keeps its value: magnitude, not SparseGPT
        mask = kept[name].weight != 0
        assert torch.equal(kept[name].weight[mask], module.weight[mask])


def test_a_fixed_input_range_needs_tokens(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "mixtral", num_local_experts=16, num_experts=16)
    with pytest.raises(UserError, match="too few calibration tokens reach it"):
        walk(path, {"stages": [{"quantize": {"weights": "int8", "activations": "int8-static"}}]}, TOKENS[:1, :4])


def test_experts_aim_at_the_compressed_model_where_the_rest_aims_at_the_dense_one(tmp_path: Path) -> None:
    """In the dense lane tokens may go to other experts, so that rows of the same tokens are not to be had."""
    path = tiny_folder(tmp_path, "mixtral")
    rows = TOKENS.repeat(4, 1)
    tree = {"stages": [{"prune": {"method": "sparsegpt", "sparsity": 0.5, "target": "dense"}}]}
    (first, _), run = walk(path, tree, rows)
    assert not run.warnings
    aimed = next(m for m in first.report.matrices if m.name.endswith("experts.0.gate_proj"))
    assert aimed.sparsity == 0.5
    assert isinstance(Recipe.from_tree(tree, "t").methods[0], SparseGPT)


def test_routers_stay_dense_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "qwen2_moe")
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate in BlockwiseModel(Checkpoint(path), torch.float32).routers
    (block, _), _ = walk(path, HALF)
    source = Checkpoint(path)
    for name in (f"{gate}.weight", "model.layers.0.mlp.gate.weight"):
        assert torch.equal(block.tensors[name], source.read([name])[name])
    (asked, _), _ = walk(path, {**HALF, "targets": {"include": ["*", "*.shared_expert_gate"]}})
    assert (asked.tensors[f"{gate}.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_norm_that_the_router_reads_too_is_not_divided(model_type: str, tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(tiny_folder(tmp_path, model_type)), torch.float32)
    with gates([b.module for b in model.blocks]):
        call = model.start_forwards([TOKENS[:1, :12]])[0].call
    found = map_block(model.load_block(0), call)
    assert not found.unreached
    folded = [m.name.rpartition(".")[2] for group in found.groups if group.fold for m in group.matrices]
    assert folded == ["q_proj", "k_proj", "v_proj"]


def test_a_matrix_that_is_read_without_a_call_stays_dense(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "mamba")
    (block, _), run = walk(path, W4)
    name = "backbone.layers.0.mixer.dt_proj"
    assert torch.equal(block.tensors[f"{name}.weight"], Checkpoint(path).read([f"{name}.weight"])[f"{name}.weight"])
    assert f"{name}: left dense, the block reads its weight without calling it" in run.warnings


def test_quirks_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its entry the experts of each such model would not be seen."""
    for model_type in ("llama4_text", "dbrx", "jetmoe"):
        path = tiny_folder(tmp_path / model_type, model_type)
        assert BlockwiseModel(Checkpoint(path), torch.float32).expert_layers
        with monkeypatch.context() as without:
            without.setattr("llmcompress.model.experts.UNDECLARED", ())
            assert not BlockwiseModel(Checkpoint(path), torch.float32).expert_layers


def test_numbers_are_told_as_ranges() -> None:
    starved = Starved(["a.experts"])
    for expert in (7, 1, 2, 3):
        starved.note(f"a.experts.{expert}.up_proj")
    starved.note("a.other")
    first, second = starved.warnings()
    assert first.startswith("a.experts: experts 1–3, 7 got fewer")
    assert second.startswith("a.other: no calibration token reached it")
    assert not list(starved.warnings())


def test_stacked_matrices_are_known_by_their_type(tmp_path: Path) -> None:
    for model_type, stacked in STACKED.items():
        model = BlockwiseModel(Checkpoint(tiny_folder(tmp_path / model_type, model_type)), torch.float32)
        kinds = {type(module) is StackedLinear for module in experts_of(model).values()}
        assert kinds == {stacked and model_type != "llama4_text"}
    assert STACKED.keys() <= ALL.keys()


def test_stored_tensors_of_a_layer_are_whole(tmp_path: Path) -> None:
    """No tensor of the checkpoint is lost, whatever the layout."""
    for model_type in ("granitemoe", "gpt_oss"):
        path = tiny_folder(tmp_path / model_type, model_type)
        names = {name for file in path.glob("*.safetensors") for name in load_file(file)}
        model = BlockwiseModel(Checkpoint(path), torch.float32)
        assert names == {*model.rest_sources(), *(n for i in range(2) for n in model.block_sources(i))}
