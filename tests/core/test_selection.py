from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.core.kernels.select_cpu import keep_highest, keep_highest_of_each


@pytest.mark.parametrize("distinct", [3, 50, 10**6])
@pytest.mark.parametrize("drop", [0, 1, 777, 1500, 2999, 3000])
def test_selection_drops_exactly_the_lowest(distinct, drop):
    random = np.random.default_rng(distinct + drop)
    score = (random.integers(0, distinct, (30, 100)) / distinct * 1e-3).astype(np.float32)
    keep = keep_highest(torch.from_numpy(score), drop).numpy()
    assert keep.shape == score.shape
    assert (~keep).sum() == drop
    if 0 < drop < score.size:
        assert score[~keep].max() <= score[keep].min()


def test_ties_go_to_the_later_position():
    assert keep_highest(torch.tensor([1.0, 1, 0, 1, 1]), 3).tolist() == [False, False, False, True, True]


def test_infinite_scores_sort_last():
    assert keep_highest(torch.tensor([torch.inf, 3, torch.inf, 1e-40]), 2).tolist() == [True, False, True, False]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 32, 33, 100, 1000])
@pytest.mark.parametrize("kind", ["ties", "signed", "infinite"])
def test_every_part_drops_exactly_its_lowest_and_the_earlier_of_equals(size, kind):
    random = np.random.default_rng(size)
    score = random.normal(size=(150, size)).astype(np.float32)
    if kind == "ties":
        score = np.round(score)
    elif kind == "infinite":
        score[random.random(score.shape) < 0.3] = -np.inf
    for drop in {0, 1, size // 2, size - 1} - {size}:
        keep = keep_highest_of_each(torch.from_numpy(score), drop).numpy()
        order = np.argsort(score, axis=1, kind="stable")
        expected = np.ones_like(keep)
        np.put_along_axis(expected, order[:, :drop], False, 1)
        assert (keep == expected).all()
