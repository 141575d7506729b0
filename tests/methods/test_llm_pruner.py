"""Importance as the formulas say it, and the choice of widths against all others that are possible."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmcompress.core.structure import GroupKind, keep_highest, lowest_cost
from llmcompress.errors import UserError
from llmcompress.methods.llm_pruner import LLMPruner

HEADS = GroupKind("KV groups", 4, 300, (1, 2, 4), fine=False)
CHANNELS = GroupKind("MLP channels", 24, 20, range(1, 25), fine=True)
TOTAL = 4 * 300 + 24 * 20


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1])
def test_importance_is_the_formula_written_out(axis: int) -> None:
    w, g, second = random(3, 5), random(3, 5, seed=1), random(3, 5, seed=2).square()
    lines = [[(i, j) if axis == 0 else (j, i) for j in range(w.shape[1 - axis])] for i in range(w.shape[axis])]
    formulas = {
        "element": lambda at: sum(abs(float(w[p] * g[p])) for p in at),
        "vector": lambda at: abs(sum(float(w[p] * g[p]) for p in at)),
        "second": lambda at: sum(float(w[p] ** 2 * second[p]) for p in at),
        "mixed": lambda at: sum(abs(float(w[p] * g[p] - w[p] ** 2 * second[p] / 2)) for p in at),
    }
    for taylor, formula in formulas.items():
        method = LLMPruner(0.2, taylor=taylor)  # type: ignore[arg-type]
        found = method.saliency(w, g, second if method.needs_squares else None, axis)
        assert found.tolist() == pytest.approx([formula(at) for at in lines], rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_widths_are_the_cheapest_within_a_step_of_the_target(sparsity: float, multiple: int, seed: int) -> None:
    scores = [random(3, 4, seed=seed).abs() * 8, random(3, 24, seed=seed + 7).abs()]
    chosen = LLMPruner(sparsity, multiple=multiple).choose([HEADS, CHANNELS], scores, TOTAL)
    options = {}
    for heads, channels in itertools.product((1, 2, 4), range(1, 25)):
        weights = (4 - heads) * 300 + (24 - channels) * 20
        if weights <= sparsity * TOTAL and channels % multiple == 0:
            cost = sum(
                sum(sorted(row.tolist())[: len(row) - k])
                for s, k in zip(scores, (heads, channels), strict=True)
                for row in s
            )
            options[heads, channels] = (weights, cost)
    best = max(weights for weights, _ in options.values())
    near = {k: cost for k, (weights, cost) in options.items() if weights > best - 20 * multiple}
    widths = tuple(kept.groups.shape[1] for kept in chosen)
    assert widths in near and near[widths] == pytest.approx(min(near.values()))
    assert sum(kept.removed_weights for kept in chosen) <= sparsity * TOTAL


def test_every_block_keeps_as_many_and_each_its_own() -> None:
    scores = [random(3, 4).abs(), random(3, 24, seed=3).abs()]
    for kept, score in zip(LLMPruner(0.3, multiple=4).choose([HEADS, CHANNELS], scores, TOTAL), scores, strict=True):
        assert kept.groups.shape[0] == 3
        for groups, row in zip(kept.groups, score, strict=True):
            stay = groups.tolist()
            gone = set(range(len(row))) - set(stay)
            assert stay == sorted(set(stay)) and all(row[i] <= min(row[stay]) for i in gone)


def test_costs_of_removing_the_lowest() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.5, 9.0, 4.0]])
    assert lowest_cost(scores).tolist() == [0, 1.5, 1 + 2 + 0.5 + 4, 1 + 2 + 3 + 0.5 + 4 + 9]
    assert keep_highest(scores, 2).tolist() == [[0, 2], [1, 2]]


def test_a_target_that_cannot_be_met_is_refused() -> None:
    scores = [torch.zeros(2, 4), torch.zeros(2, 24)]
    with pytest.raises(UserError, match=r"at most 63\.1% of the blocks' weights"):
        LLMPruner(0.9).choose([HEADS, CHANNELS], scores, TOTAL)
    with pytest.raises(UserError, match="smallest step"):
        LLMPruner(0.01).choose([HEADS, CHANNELS], scores, TOTAL)


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 0.0}, {"sparsity": 1.0}, {"multiple": 0}, {"samples": 0}, {"length": 1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        LLMPruner(**{"sparsity": 0.2, **wrong})  # type: ignore[arg-type]
