"""Removing channels is zeroing them, on thirteen kinds of networks; what is coupled is known by hand for some."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from llmcompress.vision.channels import remove, remove_checked, spaces, zeroed
from llmcompress.vision.graph import channel_graph
from llmcompress.vision.network import logits

_spec = importlib.util.spec_from_file_location("vision_nets", Path(__file__).parent / "nets.py")
assert _spec is not None and _spec.loader is not None
nets = sys.modules.setdefault("vision_nets", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(nets)


@pytest.mark.parametrize("kind", nets.KINDS)
@torch.no_grad()
def test_the_smaller_network_equals_the_one_with_those_channels_zeroed(kind: str) -> None:
    module, x = nets.network(kind), nets.images(kind)
    graph = channel_graph(module, x)
    found = spaces(module, graph)
    assert found
    generator = torch.Generator().manual_seed(3)
    gone = torch.cat([s.units[torch.randperm(len(s.units), generator=generator)[: len(s.units) // 3]] for s in found])
    before = sum(p.numel() for p in module.parameters())
    reference, dense = logits(zeroed(module, graph, gone), x), logits(module, x)
    graph = remove(module, graph, gone)
    assert sum(p.numel() for p in module.parameters()) < before
    torch.testing.assert_close(logits(module, x), reference, rtol=1e-4, atol=1e-5)
    assert (dense - reference).abs().max() > 1e-4  # the channels mattered
    left = torch.cat([s.units[:1] for s in spaces(module, graph) if len(s.units) > 1])
    assert remove_checked(module, graph, left, x)[1] < 1e-5  # and again, from what is left of the graph


def names(kind: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    module = nets.network(kind)
    return {s.name: (len(s.units), s.layers) for s in spaces(module, channel_graph(module, nets.images(kind)))}


def test_a_shortcut_couples_what_it_adds() -> None:
    found = names("bottleneck")
    assert set(found["three.0"][1]) == {"three.0", "shortcut.0"}
    assert {name: count for name, (count, _) in found.items()} == {"stem.0": 16, "one.0": 6, "two.0": 6, "three.0": 20}


def test_a_layer_norm_freezes_what_it_mixes_and_leaves_the_rest() -> None:
    assert names("convnext") == {"wide": (24, ("wide",))}


def test_a_group_of_a_convolution_goes_whole() -> None:
    assert names("grouped") == {"body.0.0": (6, ("body.0.0", "body.2.0")), "body.4": (8, ("body.4",))}


def test_a_gate_goes_with_its_channel_and_a_map_over_positions_stays() -> None:
    found = names("squeeze-excite")
    assert set(found["conv"][1]) == {"conv", "up"} and "where" not in found and found["down"][0] == 4


def test_padding_and_its_activations_freeze_nothing() -> None:
    assert {name: count for name, (count, _) in names("padded").items()} == {"first": 10, "second": 8}
    assert "mobilenet_v2.layer.0.expand_1x1.convolution" in names("hf-mobilenet-v2")  # pads as TensorFlow does


def test_concatenation_keeps_channels_apart_and_halves_alike() -> None:
    assert {name: count for name, (count, _) in names("dense").items()} == {"stem": 6} | {
        f"convs.{i}": 4 for i in range(3)
    }
    assert names("two-branch")["left"][0] == 6  # 12 channels, cut in halves that are multiplied
