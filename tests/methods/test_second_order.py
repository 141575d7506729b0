"""Laws of SparseGPT, GPTQ, their joint sweep and AWQ on a group of matrices."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods import METHODS, curvature
from llmcompress.methods.awq import AWQ, clipped
from llmcompress.methods.gptq import GPTQ, run_time_gram
from llmcompress.methods.rtn import RTN
from llmcompress.methods.smoothquant import SmoothQuant
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.methods.wanda import Wanda

COLUMNS = 128
INT4, INT3, INT8 = QuantGrid(4, group=32), QuantGrid(3, group=32), QuantGrid(8)
TOKENWISE = QuantGrid(8, group="token", dynamic=True)
HALF, TWO_FOUR = Sparsity.parse("0.5"), Sparsity.parse("2:4")


def rows(tokens: int = 500, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=random) / COLUMNS**0.5 + 0.3 * torch.eye(COLUMNS)
    scale = torch.rand(COLUMNS, generator=random).square() * 3 + 0.1
    return torch.randn(tokens, COLUMNS, generator=random) @ mixing * scale


def run(*methods: Method, x: Tensor | None = None, dense: Tensor | None = None) -> MatrixGroup:
    """Two matrices over the same rows through the methods."""
    random = torch.Generator().manual_seed(1)
    group = MatrixGroup([Matrix(name, torch.randn(40, COLUMNS, generator=random)) for name in "qk"])
    stats = InputStats(COLUMNS, frozenset().union(*(m.needs for m in methods)))
    stats.update(rows() if x is None else x, dense)
    run_methods(methods, group, stats)
    return group


def originals() -> list[Tensor]:
    return [m.weight for m in run()]


def error(group: MatrixGroup, x: Tensor | None = None) -> float:
    return group.output_error(rows() if x is None else x, originals())


def test_gptq_loses_less_than_rounding():
    assert error(run(GPTQ(INT4))) < 0.8 * error(run(RTN(INT4)))
    assert error(run(GPTQ(INT8, TOKENWISE))) < error(run(RTN(INT8, TOKENWISE)))


def test_codes_read_back_as_the_weights():
    for group in (run(GPTQ(INT4)), run(GPTQ(INT4, act_order=True)), run(SparseGPT(TWO_FOUR), GPTQ(INT4))):
        for matrix in group:
            assert torch.equal(matrix.quantized.dequantize(), matrix.weight)
            assert matrix.quantized.levels.scale.shape == (40, 4)


def test_asymmetric_per_tensor_and_mse_grids_round_too():
    for grid in ("int4-g32-asym", "int8-tensor", "int3-g64-mse"):
        group = run(GPTQ(QuantGrid.parse_weights(grid)))
        assert error(group) < error(run(RTN(QuantGrid.parse_weights(grid))))


def test_act_order_is_the_sweep_over_sorted_columns_folded_back():
    x = rows()
    order = x.square().sum(0).argsort(descending=True)
    group = run(GPTQ(INT8, act_order=True), x=x)
    sorted_group = MatrixGroup([Matrix("q", w[:, order]) for w in originals()])
    stats = InputStats(COLUMNS, {"gram"})
    stats.update(x[:, order])
    GPTQ(INT8).apply(sorted_group, stats)
    for matrix, expected in zip(group, sorted_group, strict=True):
        rows_alike = ((matrix.weight[:, order] - expected.weight).abs() < 1e-4).all(1)
        assert rows_alike.float().mean() > 0.95


def test_act_order_keeps_groups_in_their_original_order():
    for matrix, w in zip(run(GPTQ(INT4, act_order=True)), originals(), strict=True):
        assert torch.equal(matrix.quantized.levels.scale, INT4.fit(w).scale)


def test_act_order_with_n_of_m_is_refused():
    with pytest.raises(UserError, match="act_order"):
        GPTQ(INT4, act_order=True).solve(run(), InputStats(COLUMNS, {"gram"}), (), TWO_FOUR)


@pytest.mark.parametrize("sparsity", [HALF, TWO_FOUR])
def test_adjacent_pruning_and_rounding_are_one_sweep(sparsity):
    joint = run(SparseGPT(sparsity), GPTQ(INT4))
    assert error(joint) < error(run(SparseGPT(sparsity), RTN(INT4)))
    for matrix in joint:
        assert int((~matrix.keep).sum()) == matrix.keep.numel() // 2
        assert (matrix.weight[~matrix.keep] == 0).all()


def test_steps_are_joined_only_where_they_solve_the_same_problem():
    assert SparseGPT(HALF).join(GPTQ(INT4)) is not None
    assert SparseGPT(HALF).join(GPTQ(INT4, act_order=True)) is not None
    for following in (RTN(INT4), SmoothQuant(), GPTQ(INT4, damping=0.01), GPTQ(INT4, target="dense")):
        assert SparseGPT(HALF).join(following) is None
    assert SparseGPT(TWO_FOUR).join(GPTQ(INT4, act_order=True)) is None
    assert SparseGPT(HALF, refit=True).join(GPTQ(INT4)) is None


def test_joined_step_asks_for_no_more_than_its_parts():
    for rounding in (GPTQ(INT4), GPTQ(INT8, TOKENWISE), GPTQ(INT4, target="dense")):
        joint = SparseGPT(HALF, target=rounding.target).join(rounding)
        assert joint.needs <= SparseGPT(HALF, target=rounding.target).needs | rounding.needs


@pytest.mark.parametrize("between", [(), (SmoothQuant(0.5),)], ids=["adjacent", "smoothed between"])
def test_gptq_holds_and_compensates_the_mask_of_an_earlier_stage(between):
    masked, compensated = run(Wanda(HALF), *between, RTN(INT8)), run(Wanda(HALF), *between, GPTQ(INT8))
    for before, after in zip(masked, compensated, strict=True):
        assert torch.equal(before.keep, after.keep)
        assert (after.weight[~after.keep] == 0).all()
    assert error(compensated) < 0.9 * error(masked)


def test_refit_before_rounding_helps_a_mask_of_an_earlier_stage():
    assert error(run(Wanda(HALF), GPTQ(INT8, refit=True))) < error(run(Wanda(HALF), GPTQ(INT8)))


def test_refit_and_moving_zeros_each_lower_the_error():
    for sparsity in (HALF, TWO_FOUR):
        plain = error(run(SparseGPT(sparsity)))
        refit = error(run(SparseGPT(sparsity, refit=True)))
        grown = run(SparseGPT(sparsity, refit=True, grow=3))
        assert error(grown) < refit < plain
        for matrix in grown:
            assert int((~matrix.keep).sum()) == matrix.keep.numel() // 2
            assert torch.equal(matrix.weight != 0, matrix.keep)


def test_rounding_after_a_refit_holds_its_mask():
    refit, rounded = run(SparseGPT(HALF, refit=True)), run(SparseGPT(HALF, refit=True), GPTQ(INT8))
    for before, after in zip(refit, rounded, strict=True):
        assert torch.equal(before.keep, after.keep)
        assert (after.weight[~after.keep] == 0).all()
    assert error(rounded) < 1.1 * error(refit)


def test_drafts_have_no_use_for_a_second_lane():
    given = {"sparsity": HALF, "weights": QuantGrid(8), "target": "dense"}
    aiming = [cls for cls in METHODS.values() if "target" in {f.name for f in fields(cls)}]
    assert len(aiming) == 4
    for cls in aiming:
        method = cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})
        assert "cross" in method.needs and "cross" not in method.draft().needs


@pytest.mark.parametrize("weights", ["int4", "int4-g8", "int4-asym-mse", "int4-stochastic"])
def test_rows_that_are_decided_for_themselves_can_be_decided_apart(weights):
    method = GPTQ(QuantGrid.parse_weights(weights))
    whole, parts = Matrix("m", torch.randn(12, 32, generator=torch.Generator().manual_seed(0))), []
    for rows in (slice(0, 6), slice(6, 12)):
        parts.append(Matrix("m", whole.weight[rows].clone()))
    for matrix in (whole, *parts):
        stats = InputStats(32, method.needs)
        stats.update(torch.randn(100, 32, generator=torch.Generator().manual_seed(1)))
        method.apply(MatrixGroup([matrix]), stats)
    alike = torch.allclose(whole.weight, torch.cat([part.weight for part in parts]), atol=1e-5)  # sums differ
    assert alike == method.by_rows


def test_what_is_rounded_does_not_change_any_more():
    group = MatrixGroup([Matrix("m", torch.randn(8, 16))])
    stats = InputStats(16, {"absmax"})
    RTN(QuantGrid(8)).apply(group, stats)
    with pytest.raises(RuntimeError, match="codes are fixed"):
        Wanda(HALF).apply(group, InputStats(16, {"squares"}))
    with pytest.raises(RuntimeError, match="codes are fixed"):
        group.smooth(torch.ones(16), stats)


def test_growing_without_a_refit_is_refused():
    with pytest.raises(UserError, match="refit"):
        SparseGPT(HALF, grow=1)


@pytest.mark.parametrize("method", [SparseGPT(HALF), GPTQ(INT3)], ids=["sparsegpt", "gptq"])
def test_dense_target_meets_the_dense_outputs_better(method):
    dense = rows()
    x = dense + 0.1 * rows(seed=7)  # what compressed predecessors make of the same tokens
    kwargs = {f: getattr(method, f) for f in method.__dataclass_fields__} | {"target": "dense"}

    def distance(group: MatrixGroup) -> float:
        pairs = zip(group, originals(), strict=True)
        return sum(float((dense @ w.T - x @ m.weight.T).square().sum()) for m, w in pairs)

    aimed = run(type(method)(**kwargs), x=x, dense=dense)
    assert distance(aimed) < 0.95 * distance(run(method, x=x))


def test_dense_target_is_aimed_at_once():
    dense = rows()
    x = dense + 0.1 * rows(seed=7)
    first = run(SparseGPT(HALF, target="dense"), x=x, dense=dense)
    both = run(SparseGPT(HALF, target="dense"), SmoothQuant(0.0), GPTQ(INT8, target="dense"), x=x, dense=dense)
    for pruned, rounded in zip(first, both, strict=True):
        assert torch.equal(pruned.keep, rounded.keep)
        difference = (rounded.weight / both.smoothing - pruned.weight).norm()
        assert difference < 0.02 * pruned.weight.norm()


def test_compensation_sees_the_rows_as_they_are_rounded_at_run_time():
    x = rows()
    group = run(SmoothQuant(0.5), GPTQ(INT8, TOKENWISE))
    stats = InputStats(COLUMNS, {"rows"})
    stats.update(x[:200])
    stats.update(x[200:])
    seen = TOKENWISE.round_activations(x / group.smoothing).double()
    assert torch.allclose(run_time_gram(group, stats).double(), seen.T @ seen / len(x), atol=1e-5)


def test_matrices_of_a_group_share_one_factorisation(monkeypatch):
    calls = []
    factorise = curvature.factorise
    monkeypatch.setattr(curvature, "factorise", lambda *args, **options: calls.append(1) or factorise(*args, **options))
    run(SparseGPT(HALF))
    assert len(calls) == 1


def test_damping_used_is_reported_and_a_raise_is_warned_of():
    assert run(GPTQ(INT4, damping=0.01)).figures["damping"] == 0.01
    stats = InputStats(COLUMNS, {"gram"})
    stats.update(rows())
    stats.sums["gram"][0, 1] += 50 * float(stats.sums["gram"].diagonal().max())
    group = run()
    SparseGPT(HALF).apply(group, stats)
    assert group.figures["damping"] > 0.1
    assert "not positive definite" in group.warnings[0]
    assert all(torch.isfinite(m.weight).all() for m in group)


def test_fewer_rows_than_columns_and_dead_inputs_stay_finite():
    x = rows(20)
    x[:, 5] = 0
    for methods in ((SparseGPT(HALF),), (GPTQ(INT4, act_order=True),), (SparseGPT(TWO_FOUR, refit=True, grow=1),)):
        for matrix in run(*methods, x=x):
            assert torch.isfinite(matrix.weight).all()
            assert (matrix.weight[:, 5] == 0).all()


def test_awq_loses_less_than_rounding_and_takes_the_best_of_its_points():
    scaled, plain = run(AWQ(), RTN(INT3)), run(RTN(INT3))
    assert error(scaled) < error(plain)
    mean_abs, x = rows().abs().mean(0), rows()
    size = torch.cat(originals()).square().mean(0).sqrt()

    def lost(alpha: float, beta: float) -> float:
        s = mean_abs.pow(alpha) / size.pow(beta)
        s = s / (s.max() * s.min()).sqrt()
        rounded = [INT3.round(w * s, INT3.fit(w * s)) / s for w in originals()]
        return sum(float((x @ (q - w).T).square().sum()) for q, w in zip(rounded, originals(), strict=True))

    alpha = min((i / 20 for i in range(20)), key=lambda alpha: lost(alpha, 0))
    beta = min((i / 4 for i in range(5)), key=lambda beta: lost(alpha, beta))
    assert error(scaled) == pytest.approx(lost(alpha, beta), rel=1e-2)  # each group's largest lies on a tie
    assert scaled.figures["awq_alpha"] == pytest.approx(alpha)
    assert scaled.figures["awq_beta"] == pytest.approx(beta)


def test_awq_clipping_lowers_the_error():
    assert error(run(AWQ(clip=True), RTN(INT3))) < error(run(AWQ(), RTN(INT3)))


def test_awq_clips_each_group_to_the_best_share_given_the_errors_of_the_others():
    """At the end of the search no other share of the last group lowers the error of any row."""
    W, x = originals()[0], rows().double()
    H, size = (x.T @ x / len(x)).float(), 8
    grid = QuantGrid(3, group=size)
    chosen = clipped(W, H, grid, torch.float32)
    last = W[:, -size:]

    def lost(clamped: torch.Tensor) -> torch.Tensor:
        E = (grid.round(clamped, grid.fit(clamped)) - W).double()
        return (x @ E.T).square().sum(0)

    for step in range(20):
        share = 1 - step / 40
        low, high = last.amin(1, keepdim=True) * share, last.amax(1, keepdim=True) * share
        other = torch.cat([chosen[:, :-size], last.clamp(low, high)], 1)
        assert (lost(chosen) <= lost(other) * (1 + 1e-4)).all()
    assert lost(chosen).sum() < lost(W).sum()


def test_awq_leaves_inputs_that_cannot_be_folded():
    group = MatrixGroup([Matrix("o", originals()[0])], fold_refusal="no norm writes it")
    stats = InputStats(COLUMNS, AWQ().needs)
    stats.update(rows())
    AWQ().apply(group, stats, (RTN(INT4),))
    assert group.smoothing is None
    assert torch.equal(group.matrices[0].weight, originals()[0])


def test_awq_needs_a_grid():
    with pytest.raises(UserError, match="quantize stage"):
        run(AWQ())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_dense_target_is_the_weights_where_both_streams_are_one_though_inputs_are_rounded(bits):
    grids = QuantGrid(bits), QuantGrid.parse_activations(f"int{bits}")
    x = rows()
    x[:, :3] *= 30  # the other inputs round to zero most of the time
    found = {}
    for target in ("compressed", "dense"):
        method = GPTQ(*grids, target=target)
        stats = InputStats(COLUMNS, method.needs)
        stats.update(x, x)
        group = MatrixGroup([Matrix("q", w) for w in originals()])
        method.apply(group, stats)
        found[target] = error(group, x)
    assert found["dense"] == pytest.approx(found["compressed"], rel=0.02)
