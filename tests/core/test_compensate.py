from __future__ import annotations

import pytest
import torch

from llmcompress.core.compensate import LeastSquares, aim_at_dense
from llmcompress.core.stats import InputStats
from llmcompress.core.sweep import factorise


def rows(tokens=400, columns=48, seed=0):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + 0.3 * torch.eye(columns)
    return torch.randn(tokens, columns, generator=random) @ mixing


def problem():
    x = rows()
    W = torch.randn(12, 48, generator=torch.Generator().manual_seed(1))
    return LeastSquares(W, x.T @ x / len(x), 0.01)


def optimum(p, keep):
    """The kept weights' least squares, row by row in float64."""
    damped = (p.H + p.ridge * torch.eye(len(p.H))).double()
    best = torch.zeros(p.W.shape, dtype=torch.float64)
    for r in range(len(best)):
        k = keep[r]
        best[r, k] = torch.linalg.solve(damped[k][:, k], (damped @ p.W[r].double())[k])
    return best


def test_refit_reaches_the_least_squares_optimum():
    p = problem()
    keep = torch.rand(p.W.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    Q, loss = p.refit(keep, p.W * keep)
    assert (Q[~keep] == 0).all()
    assert float(p.loss(Q).sum()) <= 1.01 * float(p.loss(optimum(p, keep).float()).sum())
    assert torch.allclose(loss, p.loss(Q), rtol=1e-3)


def test_refit_never_raises_the_loss_of_a_row():
    p = problem()
    keep = torch.rand(p.W.shape, generator=torch.Generator().manual_seed(3)) > 0.7
    keep[0], keep[1] = True, False
    start = p.W * keep + 0.1 * keep
    _, loss = p.refit(keep, start)
    assert (loss <= p.loss(start) * (1 + 1e-4) + 1e-6).all()
    assert loss[0] < 0.05 * p.loss(start)[0]


def test_a_refit_that_starts_at_its_optimum_takes_no_step(monkeypatch):
    p = problem()
    products, multiply = [], LeastSquares._times_H
    monkeypatch.setattr(LeastSquares, "_times_H", lambda self, E: products.append(1) or multiply(self, E))
    Q, loss = p.refit(torch.ones_like(p.W, dtype=torch.bool), p.W)
    assert torch.equal(Q, p.W) and not loss.any() and len(products) == 2


@pytest.mark.parametrize("m", [0, 4])
def test_moving_zeros_keeps_their_number_and_lowers_the_loss(m):
    p = problem()
    keep = torch.arange(48).expand(12, 48) % 4 < 2
    Q, loss = p.refit(keep, p.W * keep)
    moved, Q2, lower = p.drop_and_grow(keep, Q, loss, m, share=0.05)
    assert (lower <= loss).all()
    assert lower.sum() < loss.sum()
    assert not torch.equal(moved, keep)
    assert (moved.view(12, -1, m or 48).sum(-1) == (2 if m else 24)).all()
    assert torch.equal(Q2 != 0, moved)
    assert torch.allclose(p.loss(Q2), lower, rtol=1e-3)


def test_aim_with_equal_rows_is_the_weight():
    p = problem()
    assert torch.allclose(aim_at_dense(p.W, p.H, p.H.clone(), factorise(p.H)), p.W, atol=1e-6)


def test_aim_is_the_least_squares_answer_to_the_dense_outputs():
    dense, x = rows(), rows() + 0.3 * rows(seed=5)
    stats = InputStats(48, {"gram", "cross"})
    stats.update(x[:150], dense[:150])
    stats.update(x[150:], dense[150:])
    W = problem().W
    aimed = aim_at_dense(W, stats.gram, stats.cross, factorise(stats.gram, 1e-7))
    expected = torch.linalg.lstsq(x.double(), dense.double() @ W.double().T).solution.T
    assert torch.allclose(aimed.double(), expected, atol=1e-3)


def test_cross_statistics_follow_a_rescaling():
    dense, x, s = rows(), rows(seed=1), torch.rand(48) + 0.5
    stats, expected = InputStats(48, {"gram", "cross"}), InputStats(48, {"gram", "cross"})
    stats.update(x, dense)
    stats.rescale(s)
    expected.update(x / s, dense / s)
    assert torch.allclose(stats.cross, expected.cross, atol=1e-5)
    assert torch.allclose(stats.gram, expected.gram, atol=1e-5)


def test_cross_statistics_need_dense_rows():
    with pytest.raises(ValueError, match="dense"):
        InputStats(48, {"cross"}).update(rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [100, 600, 1100])
def test_gram_is_the_sum_over_micro_batches(dtype, width):
    x = rows(300, width).to(dtype)
    stats, other = InputStats(width, {"gram"}), InputStats(width, {"gram"})
    stats.update(x[:100])
    stats.update(x[100:150].flip(0)[:, ::1])
    other.update(x[150:].T.contiguous().T)  # rows that are not contiguous
    stats.merge(other)
    exact = x.double().T @ x.double() / 300
    assert torch.allclose(stats.gram.double(), exact, atol=1e-5)
    assert torch.equal(stats.gram, stats.gram.T)
