from __future__ import annotations

import numpy as np
import pytest

from llmcompress.core.kernels.sweep_cpu import keep_highest


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("distinct", [3, 50, 10**6])
@pytest.mark.parametrize("drop", [0, 1, 777, 1500, 2999, 3000])
def test_selection_drops_exactly_the_lowest(distinct, drop, threads):
    random = np.random.default_rng(distinct + drop)
    score = (random.integers(0, distinct, (30, 100)) / distinct * 1e-3).astype(np.float32)
    keep = keep_highest(score, drop, threads)
    assert keep.shape == score.shape
    assert (~keep).sum() == drop
    if 0 < drop < score.size:
        assert score[~keep].max() <= score[keep].min()


def test_ties_go_to_the_later_position():
    assert keep_highest(np.array([1, 1, 0, 1, 1], np.float32), 3, 1).tolist() == [False, False, False, True, True]


def test_infinite_scores_sort_last():
    assert keep_highest(np.array([np.inf, 3, np.inf, 1e-40], np.float32), 2, 1).tolist() == [True, False, True, False]
