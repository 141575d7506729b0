"""Gradients taken block by block are those of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.gradients import block_gradients
from llmcompress.model.load import BlockwiseModel
from tests.architectures import tiny_folder, tiny_model

ROWS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "opt", "gpt2", "phi3"])
def test_block_by_block_gradients_are_those_of_autograd_on_the_whole_model(model_type: str, tmp_path: Path) -> None:
    blocks = BlockwiseModel(Checkpoint(tiny_folder(tmp_path, model_type)), torch.float32)
    names = [name for name, _ in blocks.blocks[0].module.named_parameters()]
    whole = tiny_model(model_type)
    each = []
    for row in ROWS:
        logits = whole(input_ids=row[None], use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, row[1:])
        wanted = {n: p for n, p in whole.named_parameters() if n.startswith(tuple(b.name for b in blocks.blocks))}
        each.append(dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)))
    order = []
    for index, block, found in block_gradients(blocks, ROWS, names, squares=True):
        order.append(index)
        for name in names:
            full = f"{block.name}.{name}"
            torch.testing.assert_close(found[name].mean, sum(g[full] for g in each) / 3, rtol=1e-3, atol=1e-5)
            squares = sum(g[full].square() for g in each) / 3
            torch.testing.assert_close(found[name].squares, squares, rtol=1e-3, atol=1e-5)
    assert order == [1, 0]


def test_steps_are_told_and_blocks_are_released(tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(tiny_folder(tmp_path)), torch.float32)
    steps: list[int] = []
    for _, block, found in block_gradients(model, ROWS, ["mlp.up_proj.weight"], advance=steps.append):
        assert found["mlp.up_proj.weight"].squares is None
        assert [b.name for b in model.blocks if next(b.module.parameters()).device.type != "meta"] == [block.name]
    assert sum(steps) == 2 * len(model.blocks)
    assert all(p.device.type == "meta" for b in model.blocks for p in b.module.parameters())
