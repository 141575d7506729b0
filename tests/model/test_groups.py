"""Input groups and folds are discovered rightly, on every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.groups import BlockMap, map_block
from llmcompress.model.load import Block, BlockwiseModel
from llmcompress.suspend import gates
from tests.architectures import CONFIGS, tiny_folder

IDS = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))

#: which matrices can be smoothed through which norm: written down from the published architectures
FOLDED = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "mistral": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen2": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen3": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "gemma": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "gemma2": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "gemma3_text": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "phi3": [("qkv_proj",), ("gate_up_proj",)],
    "falcon": [("query_key_value", "dense_h_to_4h")],
    "opt": [("q_proj", "k_proj", "v_proj"), ("fc1",)],
    "gpt_neox": [("query_key_value",), ("dense_h_to_4h",)],
    "gpt2": [("c_attn",), ("c_fc",)],
    "cohere": [("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")],
    "olmo2": [],
    "bloom": [("query_key_value",), ("dense_h_to_4h",)],
    "stablelm": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "starcoder2": [("q_proj", "k_proj", "v_proj"), ("c_fc",)],
    "gptj": [("q_proj", "k_proj", "v_proj", "fc_in")],
    "nemotron": [("q_proj", "k_proj", "v_proj"), ("up_proj",)],
}


def mapped(path: Path) -> tuple[BlockwiseModel, Block, BlockMap, tuple]:
    model = BlockwiseModel(Checkpoint(path), torch.float32)
    with gates([b.module for b in model.blocks]):
        call = model.start_forwards([IDS])[0].call
    block = model.load_block(0)
    return model, block, map_block(block, call), call


@pytest.mark.parametrize("model_type", CONFIGS)
def test_folds_are_those_of_the_architecture(model_type: str, tmp_path: Path) -> None:
    _, _, found, _ = mapped(tiny_folder(tmp_path, model_type))
    folded = [tuple(m.name.rpartition(".")[2] for m in g.matrices) for g in found.groups if g.fold]
    assert sorted(map(sorted, folded)) == sorted(map(sorted, FOLDED[model_type]))
    assert not found.unreached
    assert all(g.fold_refusal for g in found.groups if not g.fold)


@pytest.mark.parametrize("model_type", [name for name, folds in FOLDED.items() if folds])
@torch.no_grad()
def test_fold_leaves_block_output_unchanged(model_type: str, tmp_path: Path) -> None:
    """Arbitrary scales, written into the norm and into the matrices themselves."""
    _, block, found, (args, kwargs) = mapped(tiny_folder(tmp_path, model_type))

    def run() -> torch.Tensor:
        output = block.module(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
        return output[0] if isinstance(output, tuple) else output

    before = run()
    for group in found.groups:
        if group.fold:
            s = torch.rand(group.width) * 3 + 0.2
            group.fold.divide(s, torch.float32)
            for matrix in group.matrices:
                matrix.write(matrix.read() * s)
    after = run()
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4 * float(before.abs().max()))
    assert not torch.equal(after, before), "no weight was changed"


def test_norm_whose_output_is_read_elsewhere_is_refused(tmp_path: Path) -> None:
    """BLOOM can take the residual from behind the norm; dividing there would change it."""
    _, _, found, _ = mapped(tiny_folder(tmp_path, "bloom", apply_residual_connection_post_layernorm=True))
    assert not any(g.fold for g in found.groups)
    assert any("something else reads" in g.fold_refusal for g in found.groups)


def test_where_nothing_smooths_the_block_runs_once_and_the_groups_are_the_same(tmp_path: Path) -> None:
    _, block, found, call = mapped(tiny_folder(tmp_path, "llama"))
    runs: list[int] = []
    counting = block.module.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    without = map_block(block, call, folds=False)
    counting.remove()
    assert len(runs) == 1
    names = [[[m.name for m in group.matrices] for group in each.groups] for each in (found, without)]
    assert names[0] == names[1]
    assert {group.fold_refusal for group in without.groups} == {"no step smooths"}
    assert not any(group.fold for group in without.groups)


def test_snapped_scale_divides_the_norm_exactly_in_its_stored_dtype(tmp_path: Path) -> None:
    _, _, found, _ = mapped(tiny_folder(tmp_path, "gemma2"))
    group = next(g for g in found.groups if g.fold)
    assert group.fold is not None
    gain = group.fold.norm.weight + 1
    s = group.fold.snap(torch.rand(group.width) * 3 + 0.2, torch.bfloat16)
    group.fold.divide(s, torch.bfloat16)
    torch.testing.assert_close((group.fold.norm.weight + 1) * s, gain, rtol=1e-6, atol=0)
