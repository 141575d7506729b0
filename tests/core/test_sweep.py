from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.sweep import factorise, sweep, sweep_reference
from llmcompress.core.targets import Mask, Round
from llmcompress.errors import UserError

ROWS, COLUMNS = 70, 288


def problem(rows=ROWS, columns=COLUMNS, tokens=600, seed=0):
    """Weights (rows, columns) and the Gram matrix of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + 0.3 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=random) @ mixing
    return torch.randn(rows, columns, generator=random), x.T @ x / tokens


def targets_of(weight, factor, sparsity=None, grid=None, held=None, **options):
    mask = None if held is None else Mask.held(held)
    if sparsity is not None:
        mask = Mask(Sparsity.parse(sparsity), factor.V.diagonal(), len(weight))
    grid = None if grid is None else QuantGrid.parse_weights(grid)
    return mask, None if grid is None else Round(grid, weight, torch.float32, mask, **options)


def loss(Q, weight, H):
    E = (Q - weight).double()
    return float(((E @ H.double()) * E).sum())


def textbook(weight, H, sparsity=None, grid=None, block=128):
    """SparseGPT and GPTQ as published, in float64: chol(inv(H)), errors pushed to the right, column by column."""
    W, H = weight.double().numpy().copy(), H.double().numpy()
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q, keep = np.zeros_like(W), np.ones(W.shape, bool)
    scale = None if grid is None else np.abs(W).max(1) / ((2**grid.bits - 1) / 2)
    for j in range(W.shape[1]):
        group = sparsity.m or block if sparsity else 0
        if group and j % group == 0:
            now = slice(j, j + group)
            score = W[:, now] ** 2 / np.diag(U)[now] ** 2
            if sparsity.m:
                kept = np.argsort(np.argsort(score, 1), 1) >= sparsity.m - sparsity.n
            else:
                kept = np.argsort(np.argsort(score.ravel())) >= round(sparsity.ratio * score.size)
            keep[:, now] = kept.reshape(score.shape)
        q = W[:, j]
        if scale is not None:
            q = np.clip(np.round(q / scale), *grid.range) * scale
        Q[:, j] = q * keep[:, j]
        W[:, j:] -= np.outer((W[:, j] - Q[:, j]) / U[j, j], U[j, j:])
    return torch.from_numpy(Q), torch.from_numpy(keep)


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "4:8"])
def test_pruning_equals_the_textbook_three_factorisations(sparsity):
    W, H = problem()
    H += 0.01 * H.diagonal().mean() * torch.eye(COLUMNS)
    factor = factorise(H, damping=0.0)
    mask, _ = targets_of(W, factor, sparsity)
    Q = sweep(W, factor, mask)
    expected, keep = textbook(W, H, Sparsity.parse(sparsity))
    assert torch.equal(mask.keep, keep)
    assert (Q - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sparsity", [None, "2:4"])
def test_rounding_equals_the_textbook_three_factorisations(sparsity):
    W, H = problem()
    H += 0.01 * H.diagonal().mean() * torch.eye(COLUMNS)
    factor = factorise(H, damping=0.0, dtype=torch.float64)
    Q = sweep(W, factor, *targets_of(W, factor, sparsity, "int4"))
    expected, _ = textbook(W, H, sparsity and Sparsity.parse(sparsity), QuantGrid(4))
    rows_alike = ((Q - expected).abs() < 1e-4).all(1)  # a tie broken otherwise sends its row another way
    assert rows_alike.float().mean() > 0.95
    assert loss(Q, W, H) == pytest.approx(loss(expected, W, H), rel=0.01)


@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4", "3:6", "held"])
@pytest.mark.parametrize("grid", [None, "int8", "int4-g96-asym", "int4-g24-asym", "int3-g144-asym-mse", "int8-tensor"])
def test_kernel_equals_the_reference(sparsity, grid):
    W, H = problem()
    factor = factorise(H)
    if sparsity == "held":
        options = {"held": torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5}
    else:
        options = {"sparsity": sparsity}
    fast, slow = targets_of(W, factor, grid=grid, **options), targets_of(W, factor, grid=grid, **options)
    Q = sweep(W, factor, *fast)
    expected = sweep_reference(W, factor, [t for t in slow if t is not None])
    rows_alike = ((Q - expected).abs() < 1e-4).all(1)  # a tie broken otherwise sends its row another way
    assert rows_alike.float().mean() > 0.9
    assert loss(Q, W, H) == pytest.approx(loss(expected, W, H), rel=0.01)
    if fast[0] is not None and grid is None:
        assert torch.equal(fast[0].keep, slow[0].keep)
        assert rows_alike.all()


@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"),
    [(1, 1, "0.5"), (15, 7, "0.5"), (17, 20, "2:5"), (33, 44, "4:11"), (129, 301, "0.5"),
     (16, 320, "16:32"), (5, 270, "1:2")],
)  # fmt: skip
def test_rows_and_columns_that_fill_no_tile_are_taken_like_others(rows, columns, sparsity):
    W, H = problem(rows, columns)
    factor = factorise(H)
    (mask, _), (expected, _) = (targets_of(W, factor, sparsity) for _ in range(2))
    torch.testing.assert_close(sweep(W, factor, mask), sweep_reference(W, factor, [expected]), atol=1e-4, rtol=0)
    assert torch.equal(mask.keep, expected.keep)


def test_loss_is_the_norm_of_the_error_times_the_factor():
    W, H = problem()
    factor = factorise(H, damping=0.1)
    E = sweep(W, factor, *targets_of(W, factor, "2:4", "int4")) - W
    damped = H + factor.ridge * torch.eye(COLUMNS)
    assert float((E @ factor.V).square().sum()) == pytest.approx(loss(E + W, W, damped), rel=1e-4)
    assert torch.allclose(factor.V @ factor.V.T, damped, atol=1e-4)
    assert torch.equal(factor.V, factor.V.triu())


@pytest.mark.parametrize(
    ("sparsity", "grid"), [("2:4", None), ("0.5", "int4-g96"), (None, "int8"), ("3:6", "int4-g24")]
)
def test_sweep_in_place_is_the_same_over_many_blocks(sparsity, grid):
    W, H = problem(rows=130, columns=1344, tokens=2000)
    factor = factorise(H)
    Q = sweep(W, factor, *targets_of(W, factor, sparsity, grid))
    expected = sweep_reference(W, factor, [t for t in targets_of(W, factor, sparsity, grid) if t is not None])
    assert loss(Q, W, H) == pytest.approx(loss(expected, W, H), rel=0.01)
    given = W.clone()
    again = sweep(given, factor, *targets_of(W, factor, sparsity, grid), out=given)
    assert again is given
    assert torch.equal(given, Q)


@pytest.mark.parametrize(
    ("sparsity", "grid", "options"),
    [("2:4", None, {}), ("2:4", "int4-g32", {}), (None, "int4-g32-asym", {}), (None, "int8", {}), ("0.5", "int4", {}),
     (None, "int4-g32", {"level_of": torch.arange(COLUMNS - 1, -1, -1) // 32})],
)  # fmt: skip
def test_rows_taken_in_parts_are_decided_as_all_at_once(sparsity, grid, options, monkeypatch):
    W, H = problem()
    factor = factorise(H)
    expected = targets_of(W, factor, sparsity, grid, **options)
    Q = sweep_reference(W, factor, [t for t in expected if t is not None])
    monkeypatch.setattr("llmcompress.core.sweep.PART_ENTRIES", 0)
    monkeypatch.setattr("llmcompress.core.sweep.PART_ROWS", 32)  # 24, 24 and 22 rows
    found = targets_of(W, factor, sparsity, grid, **options)
    rows_alike = ((sweep(W, factor, *found) - Q).abs() < 1e-4).all(1)  # as above
    assert rows_alike.float().mean() > 0.9
    if sparsity:
        assert torch.equal(found[0].keep[rows_alike], expected[0].keep[rows_alike])
    if grid:
        torch.testing.assert_close(found[1].levels.scale[rows_alike], expected[1].levels.scale[rows_alike])


def test_sweep_with_diagonal_gram_is_rounding():
    W, _ = problem()
    grid = QuantGrid(4, group=32)
    factor = factorise(torch.diag(torch.rand(COLUMNS) + 0.1))
    Q = sweep(W, factor, None, Round(grid, W, torch.float32))
    assert torch.equal(Q, grid.round(W, grid.fit(W)))


def test_mask_that_keeps_all_gives_the_rounding_alone():
    W, H = problem()
    factor = factorise(H)
    alone = sweep(W, factor, *targets_of(W, factor, grid="int4-g32"))
    assert torch.equal(alone, sweep(W, factor, *targets_of(W, factor, "0.0", "int4-g32")))
    assert torch.equal(alone, sweep(W, factor, *targets_of(W, factor, grid="int4-g32", held=torch.ones_like(W) > 0)))


def test_sweep_that_allows_everything_changes_nothing():
    W, H = problem()
    assert torch.equal(sweep(W, factorise(H)), W)


@pytest.mark.parametrize("ratio", [0.5, 0.37, 0.9])
def test_a_ratio_gives_the_exact_number_of_exact_zeros(ratio):
    W, H = problem()
    factor = factorise(H)
    mask, _ = targets_of(W, factor, ratio)
    Q = sweep(W, factor, mask)
    assert int((Q == 0).sum()) == round(ratio * W.numel())
    assert torch.equal(Q != 0, mask.keep)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:6"])
def test_n_of_m_keeps_exactly_n_of_every_m(pattern):
    W, H = problem()
    factor = factorise(H)
    n, m = map(int, pattern.split(":"))
    Q = sweep(W, factor, *targets_of(W, factor, pattern, "int8"))
    mask, _ = targets_of(W, factor, pattern)
    sweep(W, factor, mask)
    assert (mask.keep.view(ROWS, -1, m).sum(-1) == n).all()
    assert ((Q != 0).view(ROWS, -1, m).sum(-1) <= n).all()


def test_counts_are_exact_where_all_scores_tie():
    W, H = torch.ones(ROWS, COLUMNS), torch.eye(COLUMNS)
    factor = factorise(H)
    for sparsity in ("0.5", "2:4"):
        mask, _ = targets_of(W, factor, sparsity)
        sweep(W, factor, mask)
        assert int((~mask.keep).sum()) == W.numel() // 2


@pytest.mark.parametrize("grid", ["int4-g32", "int3-g96-asym", "int8", "int4-tensor", "int4-g32-mse"])
@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4"])
def test_values_lie_on_the_grid_and_zeros_are_exact(grid, sparsity):
    W, H = problem()
    factor = factorise(H)
    mask, rounding = targets_of(W, factor, sparsity, grid)
    Q = sweep(W, factor, mask, rounding)
    assert torch.equal(rounding.grid.round(Q, rounding.levels), Q)
    if mask is not None:
        assert (Q[~mask.keep] == 0).all()


def test_held_mask_is_kept():
    W, H = problem()
    keep = torch.rand(W.shape) > 0.6
    factor = factorise(H)
    Q = sweep(W, factor, *targets_of(W, factor, grid="int8", held=keep))
    assert (Q[~keep] == 0).all()
    assert loss(Q, W, H) < 0.9 * loss(W * keep, W, H)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_channels_of_large_inputs_cost_no_compensation(sparsity):
    W, H = problem()
    scale = torch.ones(COLUMNS)
    scale[H.diagonal().argsort()[-4:]] = 64.0  # the same function: the weights are as much smaller
    losses = []
    for s in (torch.ones(COLUMNS), scale):
        factor = factorise(s[:, None] * H * s, damping=0.1)
        mask, _ = targets_of(W / s, factor, sparsity)
        losses.append(loss(sweep(W / s, factor, mask) * s, W, H))
    assert losses[1] < 1.02 * losses[0]


def test_masked_least_squares_is_never_worse_than_the_sweep():
    W, H = problem(rows=8, columns=64)
    factor = factorise(H)
    mask, _ = targets_of(W, factor, 0.5)
    Q = sweep(W, factor, mask)
    damped = (H + factor.ridge * torch.eye(64)).double()
    for w, q, keep in zip(W.double(), Q.double(), mask.keep, strict=True):
        best = torch.zeros_like(w)
        best[keep] = torch.linalg.solve(damped[keep][:, keep], (damped @ w)[keep])
        assert (best - w) @ damped @ (best - w) <= (q - w) @ damped @ (q - w) + 1e-9


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_sweep_loses_less_than_magnitude_pruning_in_aggregate(sparsity):
    losses = np.zeros(2)
    for seed in range(4):
        W, H = problem(columns=128, seed=seed)
        factor = factorise(H)
        mask, _ = targets_of(W, factor, sparsity)
        losses += loss(sweep(W, factor, mask), W, H), loss(W * Sparsity.parse(sparsity).keep_mask(W.abs()), W, H)
    assert losses[0] < 0.95 * losses[1]


def degenerate(kind):
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    if kind == "dead":
        x[:, [0, 5, 63]] = 0
    elif kind == "all dead":
        x[:] = 0
    elif kind == "constant":
        x[:, 3:9] = 2.5
    elif kind == "few rows":
        x = x[:3]
    elif kind == "duplicates":
        x[:, 32:] = x[:, :32]
    elif kind == "outliers":
        x[:, 7] *= 1e4
        x[11] *= 1e4
    return x.T @ x / len(x)


@pytest.mark.parametrize("kind", ["dead", "all dead", "constant", "few rows", "duplicates", "outliers"])
def test_degenerate_inputs_give_finite_results(kind):
    H = degenerate(kind)
    W = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    factor = factorise(H)
    for targets in (
        targets_of(W, factor, "2:4", "int4"),
        targets_of(W, factor, 0.5),
        targets_of(W, factor, None, "int4"),
    ):
        Q = sweep(W, factor, *targets)
        assert torch.isfinite(Q).all()
        assert loss(Q, W, H) <= 1.01 * loss(torch.zeros_like(W), W, H) + 1e-3
    assert torch.equal(factor.dead, H.diagonal() == 0)


def test_quantization_groups_must_not_cut_sparsity_groups():
    W, H = problem(columns=96)
    factor = factorise(H)
    with pytest.raises(UserError, match="cut through"):
        sweep(W, factor, *targets_of(W, factor, "4:8", "int4-g12"))


def test_the_number_of_threads_changes_nothing():
    W, H = problem(rows=700)
    factor = factorise(H)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([sweep(W, factor, *targets_of(W, factor, s, "int4-g96")) for s in ("0.5", "2:4")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0], other, strict=True))
