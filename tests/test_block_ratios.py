"""Sparsity by measured sensitivity: the allocation against a brute-force search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from scripts.block_ratios import LIMIT, allocate

TRIED = (0.4, 0.6)


def cost(log_cost: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The sum over the blocks (the last axis) where log KL is straight in the ratio."""
    slope = np.diff(log_cost)[:, 0] / (TRIED[1] - TRIED[0])
    return np.exp(log_cost[:, 0] + slope * (ratios - TRIED[0])).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_ratios_of_the_same_mean_cost_less(seed: int) -> None:
    random = np.random.default_rng(seed)
    low = random.uniform(-7, -4, 3)
    log_cost = np.stack([low, low + random.uniform(1, 2.5, 3)], axis=1)
    found = np.array(allocate(log_cost, TRIED, 0.5))
    assert found.mean() == pytest.approx(0.5, abs=1e-6) and np.abs(found - 0.5).max() <= LIMIT + 1e-9
    grid = np.linspace(0.5 - LIMIT, 0.5 + LIMIT, 81)
    others = np.array([(a, b, 1.5 - a - b) for a, b in product(grid, grid) if abs(1 - a - b) <= LIMIT])
    assert cost(log_cost, found) <= cost(log_cost, others).min() * (1 + 1e-9)


def test_blocks_that_are_alike_have_the_same_ratio() -> None:
    assert allocate(np.array([[-6.0, -4.5]] * 4), TRIED, 0.5) == pytest.approx([0.5] * 4)
