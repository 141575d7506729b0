"""Laws of JSQ: its score, and the activation editor before it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import held_and_fit
from llmcompress.errors import UserError
from llmcompress.methods.clip import Clip, clip_limits
from llmcompress.methods.jsq import AUTO_RHO, JSQ
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.rtn import RTN
from llmcompress.methods.smoothquant import SmoothQuant
from llmcompress.methods.wanda import Wanda

IN = 24
PIPELINE = (JSQ(Sparsity(0.5)), SmoothQuant(0.8), RTN(QuantGrid(), QuantGrid.parse_activations("int8")))


def inputs(tokens: int = 90, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, IN, generator=g) * torch.logspace(-0.5, 0.5, IN)


def group_of(*heights: int, seed: int = 1) -> MatrixGroup:
    g = torch.Generator().manual_seed(seed)
    return MatrixGroup([Matrix(f"m{i}", torch.randn(height, IN, generator=g)) for i, height in enumerate(heights)])


def stats_of(x: torch.Tensor, *kinds: str) -> InputStats:
    stats = InputStats(IN, kinds)
    for piece in x.chunk(3):
        stats.update(piece)
    return stats


def score_by_definition(weight: torch.Tensor, x: torch.Tensor, rho: float) -> torch.Tensor:
    """|W| · rms + ρ · SS in float64, every weight taken out in turn."""
    w, x = weight.double(), x.double()
    without = (x @ w.T)[:, :, None] - x[:, None, :] * w[None]
    return w.abs() * x.square().mean(0).sqrt() + rho * (without.amax(0) - without.amin(0))


@pytest.mark.parametrize("rho", [0.0, 2.1 / math.sqrt(2048), 1.0])
@pytest.mark.parametrize("pattern", ["0.5", "2:4", "4:8"])
def test_jsq_drops_the_lowest_scores_of_its_definition(pattern: str, rho: float) -> None:
    x, group = inputs(), group_of(12, 5)
    scores = [score_by_definition(m.weight, x, rho) for m in group]
    method = JSQ(Sparsity.parse(pattern), rho)
    method.apply(group, stats_of(x, *method.needs))
    for matrix, score in zip(group, scores, strict=True):
        compared = method.sparsity.m or IN
        for values, kept in zip(score.view(-1, compared), matrix.keep.view(-1, compared), strict=True):
            assert kept.sum() == compared // 2
            assert values[kept].min() >= values[~kept].max() - 1e-5 * float(score.max())


def test_jsq_without_its_range_term_is_wanda() -> None:
    x, a, b = inputs(), group_of(12), group_of(12)
    JSQ(Sparsity(0.5), rho=0.0).apply(a, stats_of(x, "squares", "rows"))
    Wanda(Sparsity(0.5)).apply(b, stats_of(x, "squares"))
    assert torch.equal(a.matrices[0].keep, b.matrices[0].keep)


def test_rho_means_the_same_for_any_number_of_tokens() -> None:
    x, a, b = inputs(), group_of(12), group_of(12)
    JSQ(Sparsity(0.5), rho=0.5).apply(a, stats_of(x, "squares", "rows"))
    JSQ(Sparsity(0.5), rho=0.5).apply(b, stats_of(x.repeat(4, 1), "squares", "rows"))
    assert torch.equal(a.matrices[0].keep, b.matrices[0].keep)


def test_weights_already_gone_are_counted_first() -> None:
    x, group = inputs(), group_of(12)
    Magnitude(Sparsity(0.25)).apply(group, InputStats(IN, ()))
    JSQ(Sparsity(0.5), rho=5.0).apply(group, stats_of(x, "squares", "rows"))
    assert ((~group.matrices[0].keep).sum(1) == IN // 2).all()


@pytest.mark.parametrize("rho", [-1.0, math.nan, math.inf])
def test_impossible_rho_is_refused(rho: float) -> None:
    with pytest.raises(UserError, match="rho"):
        JSQ(Sparsity(0.5), rho)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    pieces=st.integers(1, 5),
    ratios=st.lists(st.floats(0, 0.99), min_size=1, max_size=4),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_clip_limit_is_the_largest_entry_that_stays(
    tokens: int, pieces: int, ratios: list[float], ties: bool, seed: int
) -> None:
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed))
    x = x.round() if ties else x
    ordered = x.abs().flatten().sort(descending=True).values
    for ratio, limit in zip(ratios, clip_limits(list(x.chunk(pieces)), tuple(ratios)), strict=True):
        count = math.floor(ratio * x.numel())
        assert limit == (float(ordered[count]) if count else math.inf)


def test_clipped_statistics_see_clamped_rows_and_nothing_else_changes() -> None:
    x, group = inputs(), group_of(6)
    weight = group.matrices[0].weight
    stats = Clip((0.01,)).apply(group, stats_of(x, "rows"), PIPELINE)
    limit = clip_limits([x], (0.01,))[0]
    assert stats.clip == limit
    assert stats.count == len(x)
    torch.testing.assert_close(stats.absmax, x.clamp(-limit, limit).abs().amax(0))
    torch.testing.assert_close(stats.rms, x.clamp(-limit, limit).square().mean(0).sqrt())
    assert group.matrices[0].weight is weight
    assert group.figures == {"clip_ratio": 0.01}


def test_no_clip_gives_the_plain_statistics_of_all_later_steps() -> None:
    x, group = inputs(), group_of(6)
    stats = Clip((0.0,)).apply(group, stats_of(x, "rows"), PIPELINE)
    assert stats.needs == {"rows", "squares", "absmax"}
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert stats.clip == math.inf


def test_statistics_that_suffice_are_not_gathered_again() -> None:
    group, stats = group_of(6), stats_of(inputs(), "rows", "squares", "absmax")
    assert Clip((0.0,)).apply(group, stats, PIPELINE) is stats


class CountedJSQ(JSQ):
    """JSQ that counts its runs."""

    runs = 0

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        type(self).runs += 1
        return super().apply(group, stats, rest)


@pytest.mark.parametrize(
    ("candidates", "trials"), [((0.0,), 0), ((0.02,), 0), ((0.0, 1e-9, 2e-9), 1), ((0.0, 0.02, 0.05, 0.05), 3)]
)
def test_candidates_that_clamp_alike_are_tried_once(candidates: tuple[float, ...], trials: int) -> None:
    CountedJSQ.runs = 0
    Clip(candidates).apply(group_of(6), stats_of(inputs(400), "rows"), (CountedJSQ(Sparsity(0.5)), *PIPELINE[1:]))
    assert CountedJSQ.runs == trials


def test_clip_takes_a_candidate_that_is_clearly_better_than_the_first_and_leaves_the_group_dense() -> None:
    x, group = inputs(600), group_of(12, 5)
    x[::7] *= 5
    group.bystanders = [Matrix("router", torch.randn(3, IN))]
    before = [m.weight for m in (*group.matrices, *group.bystanders)]
    candidates = (0.5, 0.0, 0.01, 0.1)
    stats = Clip(candidates).apply(group, stats_of(x, "rows"), PIPELINE)
    errors = group.figures["clip_errors"]
    assert list(errors) == ["0.5", "0", "0.01", "0.1"]
    assert errors[f"{group.figures['clip_ratio']:g}"] == min(errors.values())
    assert stats.clip == clip_limits([x], (group.figures["clip_ratio"],))[0]
    for matrix, weight in zip((*group.matrices, *group.bystanders), before, strict=True):
        assert matrix.weight is weight
        assert matrix.keep is None
    assert group.smoothing is None
    assert group.activations is None


def test_clip_after_smoothing_judges_by_the_smoothed_outputs() -> None:
    x, group = inputs(300), group_of(8)
    stats = stats_of(x, "rows", "absmax")
    dense = group.matrices[0].weight
    SmoothQuant(0.5).apply(group, stats)
    stats = Clip((0.0, 0.02)).apply(group, stats, (RTN(QuantGrid(), QuantGrid.parse_activations("int8")),))
    assert max(group.figures["clip_errors"].values()) < 1e-3  # int8 alone: the reference is in the right scale
    torch.testing.assert_close(group.matrices[0].weight, dense * group.smoothing)
    torch.testing.assert_close(torch.cat(list(stats.iter_rows())), x.clamp(-stats.clip, stats.clip) / group.smoothing)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_few_rows_still_give_statistics(tokens: int) -> None:
    group = group_of(6)
    stats = Clip((0.0, 0.3)).apply(group, stats_of(inputs(tokens), "rows"), PIPELINE)
    run_methods(PIPELINE, group, stats)
    assert ((group.matrices[0].weight == 0).sum(1) >= IN // 2).all()
    assert bool(group.warnings) == (tokens < 2)


@pytest.mark.parametrize("candidates", [(), (1.0,), (-0.1,), (0.0, 2.0), (math.nan,)])
def test_impossible_candidates_are_refused(candidates: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="clip ratios"):
        Clip(candidates)


def test_the_whole_recipe_leaves_exact_zeros_on_the_grid() -> None:
    x, group = inputs(300), group_of(12, 5)
    dense = [m.weight for m in group]
    run_methods((Clip(), *PIPELINE), group, stats_of(x, "rows"))
    for matrix in group:
        assert (matrix.keep.sum(1) == IN // 2).all()
        assert (matrix.quantized.codes[~matrix.keep] == 0).all()
        assert torch.equal(matrix.weight, matrix.quantized.dequantize())
    unpruned = group_of(12, 5)
    run_methods(PIPELINE[1:], unpruned, stats_of(x, "absmax"))
    assert (
        unpruned.output_error(x, dense)
        < group.output_error(x, dense)
        < 0.5 * sum(float((x @ w.T).square().sum()) for w in dense)
    )


def test_auto_rho_is_the_clearly_best_candidate_on_held_back_rows() -> None:
    """Each candidate's whole pipeline run by hand on the same rows."""
    torch.manual_seed(0)
    X = torch.randn(600, 24) * torch.logspace(-1, 1, 24)
    W = torch.randn(12, 24)
    rest = (SmoothQuant(alpha=0.5), RTN(QuantGrid(bits=3), QuantGrid(bits=4, group="token", dynamic=True)))

    def stats_of(rows: torch.Tensor, needs: set[str]) -> InputStats:
        stats = InputStats(24, needs)
        stats.update(rows)
        return stats

    group = MatrixGroup([Matrix("m", W.clone())])
    method = JSQ(Sparsity.parse("0.5"), rho="auto")
    method.apply(group, stats_of(X, {"squares", "rows"}), rest)
    held, fit = held_and_fit([X], 1)
    errors = {}
    for rho in AUTO_RHO:
        trial = MatrixGroup([Matrix("m", W.clone())])
        JSQ(Sparsity.parse("0.5"), rho=rho).apply(trial, stats_of(X, {"squares", "rows"}))
        run_methods(rest, trial, stats_of(fit, {"absmax"}))
        errors[rho] = trial.output_errors(held, [W])
    best = min(errors, key=lambda rho: float(errors[rho].sum()))
    clear = best != 0 and ttest_rel(errors[0.0], errors[best]).statistic > 3
    assert group.figures["rho"] == (best if clear else 0)
    assert group.figures["rho_errors"].keys() == {f"{rho:.2g}" for rho in AUTO_RHO}
    chosen = MatrixGroup([Matrix("m", W.clone())])
    JSQ(Sparsity.parse("0.5"), rho=group.figures["rho"]).apply(chosen, stats_of(X, {"squares", "rows"}))
    assert torch.equal(group.matrices[0].keep, chosen.matrices[0].keep)


def test_trials_run_a_step_that_makes_no_trials_of_its_own() -> None:
    draft = JSQ(Sparsity.parse("2:4"), rho="auto").draft()
    assert isinstance(draft, Wanda)
    X, W = torch.randn(50, 8), torch.randn(4, 8)
    masks = []
    for method in (draft, JSQ(Sparsity.parse("2:4"), rho=0.0)):
        stats = InputStats(8, {"squares", "rows"})
        stats.update(X)
        group = MatrixGroup([Matrix("m", W.clone())])
        method.apply(group, stats)
        masks.append(group.matrices[0].keep)
    assert torch.equal(*masks)
