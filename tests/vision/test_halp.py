"""The knapsack against brute force; the latency it predicts against that of the network it makes, by a formula."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision import latency
from llmcompress.vision.budget import LatencyBudget
from llmcompress.vision.channels import ChannelOptions
from llmcompress.vision.halp import Cost, knapsack
from llmcompress.vision.images import Images
from llmcompress.vision.latency import LatencyTable, Shape, layer_calls
from llmcompress.vision.removal import Removed, remove_channels

_spec = importlib.util.spec_from_file_location("vision_nets", Path(__file__).parent / "nets.py")
assert _spec is not None and _spec.loader is not None
nets = sys.modules.setdefault("vision_nets", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(nets)


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 2, 4, 3]
    worth = [torch.rand(n, generator=generator).sort().values for n in sizes]
    cost = Cost([torch.rand(n, generator=generator).double() for n in sizes], constant=0.1)
    for s, t in ((0, 1), (1, 2), (0, 3)):
        cost.add([s, t], torch.randn(sizes[s], sizes[t], generator=generator).double())
    every = list(itertools.product(*map(range, sizes)))
    budget = sorted(map(cost.of, every))[len(every) // 3]
    budget = budget if budget > 0 else max(map(cost.of, every))
    value = {c: sum(float(w[k]) for w, k in zip(worth, c, strict=True)) for c in every}
    best = max(value[c] for c in every if cost.of(c) <= budget + 1e-9)
    found = knapsack(worth, cost, budget)
    assert found is not None and cost.of(found) <= budget + 1e-6
    assert value[tuple(found)] == pytest.approx(best, abs=1e-6)


def test_nothing_fits_less_than_the_least() -> None:
    assert knapsack([torch.tensor([1.0, 2.0])], Cost([torch.tensor([3.0, 4.0]).double()]), 2.0) is None


class Formula(LatencyTable):
    """Seconds by a formula: multiplications, in blocks of channels or not, and as much per entry put out."""

    block = 1

    def fill(self, shapes: object) -> None:
        pass

    def __getitem__(self, shape: Shape) -> float:
        a, b = (math.ceil(n / self.block) * self.block for n in (shape.inputs // shape.groups, shape.outputs))
        return 1.0 * a * b * math.prod(shape.size)

    def networks(self, dense: nn.Module, other: nn.Module, x: Tensor) -> tuple[float, float]:
        seconds = [
            1e3 + sum(self[shape] + 3.0 * entries for _, shape, entries in layer_calls(module, x))
            for module in (dense, other)
        ]
        return seconds[0], seconds[1] / seconds[0]


class Stairs(Formula):
    block = 4


def removed(
    kind: str, table: LatencyTable, ratio: float = 0.4, multiple: int = 1, rounds: int = 1, least: float = 0.0
) -> Removed:
    wanted = ChannelOptions(ratio, "latency", "taylor", multiple, rounds, images=4, least=least)
    module = nets.network(kind)
    pixels = nets.images(kind, 6)
    images = Images(pixels, torch.arange(6) % 5)
    budget = LatencyBudget(module, wanted, pixels, table, folds=True)
    before = sum(p.numel() for p in module.parameters())
    found = remove_channels(module, wanted, images, pixels[:2], lambda name: True, 0, budget)
    assert found.error < 1e-4 and sum(p.numel() for p in module.parameters()) < before
    for space in found.channels:
        assert len(module.get_parameter(f"{space['name']}.weight")) == space["after"]
    return found


@pytest.mark.parametrize("kind", ["plain", "bottleneck", "inverted", "grouped", "u-net", "two-branch", "dense"])
def test_what_is_predicted_is_what_the_smaller_network_takes(kind: str) -> None:
    found = removed(kind, Formula()).latency
    assert found["predicted"] == pytest.approx(found["measured"], rel=1e-6)
    assert 0.5 < found["measured"] < 0.6 * 1.04


@pytest.mark.parametrize("rounds", [1, 2])
def test_stairs_are_predicted_where_a_layer_reads_one_space(rounds: int) -> None:
    found = removed("bottleneck", Stairs(), rounds=rounds).latency
    assert found["predicted"] == pytest.approx(found["measured"], rel=1e-6)
    assert found["measured"] == pytest.approx(0.6, rel=0.1)


def test_rounds_never_keep_less_than_the_multiple() -> None:
    found = removed("bottleneck", Formula(), 0.6, multiple=4, rounds=3).channels
    assert all(space["after"] % 4 == 0 or space["after"] == space["before"] for space in found)
    assert any(space["after"] == 4 for space in found)


def test_a_budget_below_the_thinnest_network_is_refused() -> None:
    with pytest.raises(UserError, match="at its thinnest"):
        removed("bottleneck", Formula(), ratio=0.999)


def test_no_space_keeps_less_than_the_least_share_though_it_were_worth_less() -> None:
    free, held = (removed("bottleneck", Formula(), 0.6, least=least).channels for least in (0.0, 0.375))
    assert any(space["after"] < round(0.375 * space["before"]) for space in free)
    assert all(space["after"] >= round(0.375 * space["before"]) for space in held)


@pytest.mark.parametrize("given", [{"images": 8}, {"least": 0.5}])
def test_what_a_budget_of_latency_needs_is_for_it_alone(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no latency is measured"):
        ChannelOptions(**given)


def test_scores_of_one_space_alone_cannot_fill_a_budget_of_latency() -> None:
    with pytest.raises(UserError, match="different layers"):
        ChannelOptions(budget="latency", importance="l2")


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [Shape(2, 3, 4, (5, 5), ((3, 3), (1, 1), (1, 1), (1, 1))), Shape(2, 8, 4, (1,))]
    grouped = Shape(1, 4, 8, (3, 3), ((1, 1), (1, 1), (0, 0), (1, 1)), 4)
    table, file = LatencyTable(tmp_path / "latency.json"), tmp_path / "latency.json"
    table.fill([*shapes, grouped])
    assert all(table[shape] > 0 for shape in (*shapes, grouped))
    monkeypatch.setattr(latency, "in_turns", None)  # nothing can be measured any more
    again = LatencyTable(file)
    again.fill(shapes)
    assert again.seconds == table.seconds
    file.write_text("{}")
    with pytest.raises(UserError, match="delete it"):
        LatencyTable(file)
