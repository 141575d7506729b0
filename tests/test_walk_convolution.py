"""A block that holds a convolution goes the way of every other: grouped, calibrated on its own patches, stored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmcompress.model.load import Block
from llmcompress.recipe import Recipe
from llmcompress.suspend import SuspendedForward
from llmcompress.walk import CompressedBlock, Walk

TOKENS = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1))
PRUNE = {"stages": [{"prune": {"method": "wanda", "sparsity": "2:4"}}]}
ROUND = {"stages": [{"smooth": {}}, {"quantize": {"method": "gptq", "weights": "int4", "activations": "int8"}}]}


class Convolving(nn.Module):
    """Mixes (B, T, 8) by a norm and a Linear, and by a convolution over (T, 8) seen as 8 channels of (T / 8, 8)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.norm(x))
        return x + self.conv(x.view(len(x), 8, -1, 8)).view_as(x)


class Toy:
    """What the walk asks of a model: its blocks in memory, and forwards that wait in front of them."""

    def __init__(self, groups: int) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"embed": nn.Embedding(32, 8)})
        self.model["layers"] = nn.ModuleList(Convolving(groups) for _ in range(2))
        self.model.requires_grad_(False)
        self.model.config = PretrainedConfig(hidden_size=8)
        self.blocks = [Block(f"layers.{i}", block) for i, block in enumerate(self.model["layers"])]
        self.dense = {name: p.clone() for name, p in self.model.named_parameters()}
        self.checkpoint = SimpleNamespace(dtype=torch.float32, read=lambda names: {n: self.dense[n] for n in names})
        self.disk_name = lambda name: name
        self.device, self.dtype, self.unpacks, self.joins = "cpu", torch.float32, True, False
        self.routers, self.expert_layers, self.cuts = set(), (), {}
        self.expert_layer = lambda name: ""
        self.merges_expert = lambda name: False
        self.load_block = self.release_block = lambda index: None
        self.release_embeddings = lambda: None

    def block_sources(self, index: int) -> list[str]:
        return [name for name in self.dense if name.startswith(f"layers.{index}.")]

    def start_forwards(self, batches: list[Tensor], kind: Any = SuspendedForward) -> list[SuspendedForward]:
        forwards = [kind(lambda ids=ids: self.run(ids)) for ids in batches]
        for forward in forwards:
            forward.resume()
        return forwards

    def run(self, ids: Tensor) -> Tensor:
        x = self.model["embed"](ids)
        for block in self.model["layers"]:
            x = block(x)
        return x


def walked(groups: int, tree: object) -> tuple[Toy, list[CompressedBlock], list[str]]:
    toy: Any = Toy(groups)
    walk = Walk(toy, Recipe.from_tree(tree, "test"), TOKENS)
    return toy, list(walk.run()), walk.warnings


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_each_group_of_a_convolution_is_pruned_by_the_patches_it_sees(groups: int) -> None:
    """Wanda's choice of two of every four, from the inputs of the compressed model's last convolution."""
    toy, finished, _ = walked(groups, PRUNE)
    caught: list[Tensor] = []
    conv = toy.model["layers"][1].conv
    conv.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    toy.run(TOKENS)
    inputs, name = 8 // groups, "layers.1.conv.weight"
    for g in range(groups):
        channels = slice(g * inputs, (g + 1) * inputs)
        norms = nn.functional.unfold(caught[0][:, channels], 3, padding=1).square().sum((0, 2)).sqrt()
        score = (toy.dense[name][channels].flatten(1).abs() * norms).unflatten(1, (-1, 4))
        kept = torch.zeros_like(score).scatter(2, score.topk(2).indices, 1.0).flatten(1)
        pruned = finished[1].tensors[name][channels].flatten(1)
        assert torch.equal(pruned, toy.dense[name][channels].flatten(1) * kept)
    assert torch.equal(finished[1].tensors[name], conv.weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_rounded_convolution_is_stored_dense_with_a_warning_and_its_input_is_neither_folded_nor_rounded(
    groups: int,
) -> None:
    toy, finished, warnings = walked(groups, ROUND)
    for index, block in enumerate(finished):
        name = f"layers.{index}.conv"
        assert set(block.schemes) == {f"layers.{index}.linear"}
        stored = block.tensors[f"{name}.weight"]
        assert stored.shape == (8, 8 // groups, 3, 3) and stored.dtype == torch.float32
        assert all(len(row.unique()) <= 16 for row in stored.flatten(1))
        assert torch.equal(stored, toy.model.get_submodule(name).weight)
        assert sum(name in w and "stored dense and inputs are not rounded" in w for w in warnings) == 1
        group = next(g for g in block.report.groups if name in g.name)
        assert not group.folded and "convolution" in group.fold_refusal


def test_propagating_dense_inputs_stores_every_group_of_a_convolution() -> None:
    toy, finished, _ = walked(2, {**PRUNE, "propagate": "dense"})
    name = "layers.0.conv.weight"
    assert torch.equal(toy.model.get_parameter(name), toy.dense[name])
    assert (finished[0].tensors[name].flatten(1).count_nonzero(1) == 18).all()
