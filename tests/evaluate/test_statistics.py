"""Intervals and tests against brute force, scipy and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmcompress.evaluate import statistics
from llmcompress.evaluate.statistics import (
    holm,
    interval,
    mcnemar,
    paired_permutation,
    resampled_sums,
    share_interval,
    verdict,
)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    losses, counts = random(0).gamma(4, 1, 80), random(1).integers(1, 9, 80).astype(float)
    draws = resampled_sums(np.stack([losses, counts], axis=1), random(2), 20_000)
    found = interval(draws[:, 0] / draws[:, 1])
    theirs = stats.bootstrap(
        (losses, counts), lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True, vectorized=True, n_resamples=20_000, method="percentile", rng=random(3),
    ).confidence_interval  # fmt: skip
    assert found == pytest.approx((theirs.low, theirs.high), rel=5e-3)


def test_the_interval_covers_the_true_value_as_often_as_it_says() -> None:
    trials, covered = 400, 0
    for trial in range(trials):
        values = random(trial).exponential(1.0, (60, 1))
        found = interval(resampled_sums(values, random(10_000 + trial), 500)[:, 0] / 60)
        assert found is not None
        covered += found[0] <= 1.0 <= found[1]
    assert 0.90 <= covered / trials <= 0.98  # 0.95, less a little for skewed data and 60 units


def test_resamples_are_drawn_in_chunks_without_a_change_of_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    draws = resampled_sums(np.ones((30, 2)), random(0), 10)
    assert draws.shape == (10, 2) and (draws == 30).all()


def test_an_interval_with_a_draw_that_is_no_number_is_none() -> None:
    assert interval(np.array([1.0, np.nan])) is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_the_permutation_test_counts_every_sign_pattern(values: list[int]) -> None:
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    expected = np.mean([s >= abs(sum(values)) for s in sums])
    assert paired_permutation(np.array(values, dtype=float), random(0)) == pytest.approx(expected)


def test_the_permutation_test_is_scipys() -> None:
    a, b = random(0).normal(0.3, 1, 11), random(1).normal(0, 1, 11)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: np.sum(x - y, axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert paired_permutation(a - b, random(2)) == pytest.approx(theirs.pvalue)


def test_the_drawn_permutation_test_tends_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = random(0).normal(0.4, 1, 13)
    exact = paired_permutation(differences, random(0))
    monkeypatch.setattr(statistics, "EXACT_UNITS", 0)
    assert paired_permutation(differences, random(0)) == pytest.approx(exact, abs=0.01)


def test_the_permutation_test_calls_noise_a_difference_as_rarely_as_it_says() -> None:
    p = [paired_permutation(random(trial).standard_t(3, 12), random(0)) for trial in range(500)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.08


def test_the_interval_of_a_share_is_wilsons_and_never_empty() -> None:
    z, n, p = stats.norm.ppf(0.975), 50, 12 / 50
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2),
    )
    assert share_interval(12, 50) == pytest.approx((middle - half, middle + half))
    assert share_interval(0, 3)[1] > 0.5 and share_interval(3, 3)[0] < 0.5


def test_equal_losses_are_no_difference() -> None:
    assert paired_permutation(np.zeros(40), random(0)) == 1.0


def test_mcnemar_is_scipys_exact_binomial_test_and_one_without_disagreement() -> None:
    assert mcnemar(3, 12) == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0


def test_holm_multiplies_the_smallest_by_all_the_next_by_one_less_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_difference_inside_the_noise_is_called_that() -> None:
    assert verdict(0.05, worse=True) == verdict(0.4, worse=False) == "within noise"
    assert verdict(0.049, worse=True) == "worse" and verdict(0.0001, worse=False) == "better"
    assert verdict(None, worse=True) == ""
