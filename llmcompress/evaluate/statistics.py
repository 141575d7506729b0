"""How sure a figure is, and whether two models differ by more than chance.

Intervals are percentile bootstraps: units (windows, documents, items) are drawn with replacement, and the figure is
computed from each draw; shares of right answers have Wilson's interval. Log losses of two models are compared by a
paired sign-flip permutation test, accuracies by McNemar's exact test; where many comparisons stand in one table, Holm's
step-down keeps the chance of any false one below the level. Everything random comes from a generator that is passed
in."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: draws of a bootstrap, and of a permutation test that is too large to enumerate
RESAMPLES = 2_000
FLIPS = 20_000
#: of intervals; a difference with p ≥ 1 − LEVEL is called noise
LEVEL = 0.95
#: up to this many units the permutation test goes through all 2ⁿ sign patterns
EXACT_UNITS = 14
_CHUNK = 1 << 22  # elements of one chunk of draws


def resampled_sums(sums: Floats, generator: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Column sums over units drawn with replacement, once per resample.

    Args:
        sums: (units, k) what each unit contributes.

    Returns:
        (resamples, k)
    """
    units = len(sums)
    step = max(1, _CHUNK // units)
    even = np.full(units, 1 / units)
    drawn = [
        generator.multinomial(units, even, size=min(step, resamples - start)).astype(np.float64) @ sums
        for start in range(0, resamples, step)
    ]
    return np.concatenate(drawn)


def interval(draws: Floats) -> tuple[float, float] | None:
    """The central ``LEVEL`` of the draws; None if one is not a number."""
    if not len(draws) or np.isnan(draws).any():
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def share_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's interval of a share: what a bootstrap of 0s and 1s tends to, but of use at none and at all as well."""
    from scipy.stats import binomtest  # large, and a compression needs none of it

    found = binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def paired_permutation(differences: Floats, generator: np.random.Generator) -> float:
    """Two-sided p of a sum of paired differences, if each one's sign were a coin's toss.

    Exact up to ``EXACT_UNITS`` units; above that from ``FLIPS`` draws, (1 + as extreme) / (1 + draws), so
    never below 5e-5.

    Args:
        differences: (units,)
    """
    differences = differences[np.isfinite(differences)]
    units = len(differences)
    if not differences.any():
        return 1.0
    size = np.abs(differences)
    observed = abs(differences.sum()) - 1e-12 * size.sum()  # sums of the same terms in another order are equal
    if units <= EXACT_UNITS:
        patterns = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ size) >= observed))
    step, extreme = max(1, _CHUNK // units), 0
    for start in range(0, FLIPS, step):
        signs = generator.integers(0, 2, (min(step, FLIPS - start), units), dtype=np.int8)
        extreme += int(np.sum(np.abs((1.0 - 2.0 * signs) @ size) >= observed))
    return (1 + extreme) / (1 + FLIPS)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test.

    Args:
        gained: items that only the model has right.
        lost: items that only the reference has right.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def verdict(p: float | None, worse: bool) -> str:
    """``worse``, ``better`` or ``within noise``; empty where nothing was compared."""
    if p is None or math.isnan(p):
        return ""
    if p >= 1 - LEVEL - 1e-12:
        return "within noise"
    return "worse" if worse else "better"
