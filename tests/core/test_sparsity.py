"""Laws of the masks: counts are exact, ties included, and the right weights go."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.core.sparsity import Sparsity, count_nonzero, zero_dropped
from llmcompress.errors import UserError


def scores(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "constant":
        return torch.full((rows, columns), 0.25)
    if kind == "ties":
        return torch.randint(0, 3, (rows, columns), generator=g).float()
    return torch.randn(rows, columns, generator=g)


KIND = st.sampled_from(("normal", "ties", "constant"))


@settings(max_examples=150, deadline=None)
@given(
    kind=KIND, rows=st.integers(1, 9), columns=st.integers(1, 70), ratio=st.floats(0, 0.99), seed=st.integers(0, 999)
)
def test_ratio_drops_exactly_its_share_of_every_row(
    kind: str, rows: int, columns: int, ratio: float, seed: int
) -> None:
    score = scores(kind, rows, columns, seed)
    keep = Sparsity(ratio).keep_mask(score)
    assert ((~keep).sum(1) == round(ratio * columns)).all()
    for row, kept in zip(score, keep, strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max()


@settings(max_examples=150, deadline=None)
@given(
    kind=KIND,
    pattern=st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8", "5:8", "2:3"]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_n_of_m_keeps_the_best_subset_of_every_group_by_brute_force(
    kind: str, pattern: str, rows: int, groups: int, seed: int
) -> None:
    sparsity = Sparsity.parse(pattern)
    score = scores(kind, rows, groups * sparsity.m, seed)
    keep = sparsity.keep_mask(score)
    for values, kept in zip(score.view(-1, sparsity.m), keep.view(-1, sparsity.m), strict=True):
        assert int(kept.sum()) == sparsity.n
        best = max(sum(values[list(chosen)].tolist()) for chosen in combinations(range(sparsity.m), sparsity.n))
        assert float(values[kept].sum()) == pytest.approx(best, abs=1e-5)


@given(ratio=st.floats(0, 0.99), count=st.integers(0, 10_000))
def test_zeros_of_a_ratio_is_rounded_to_nearest(ratio: float, count: int) -> None:
    assert abs(Sparsity(ratio).zeros_of(count) - ratio * count) <= 0.5


@pytest.mark.parametrize("text", ["2:4", "4:8", "0.5", "0", "0.4375", "0.999999"])
def test_sparsity_reads_back_as_written(text: str) -> None:
    assert str(Sparsity.parse(text)) == text
    assert Sparsity.parse(str(Sparsity.parse(text))) == Sparsity.parse(text)


@pytest.mark.parametrize("text", ["5:4", "4:4", "0:4", "1", "1.5", "-0.1", "half", "", "nan", "2:4:8", None])
def test_impossible_sparsity_is_refused_in_one_line(text: str | None) -> None:
    with pytest.raises(UserError) as caught:
        Sparsity.parse(text)
    assert "\n" not in str(caught.value) and "write" in str(caught.value)


def test_pattern_that_does_not_divide_the_width_is_a_misfit() -> None:
    assert "10" in Sparsity.parse("2:4").misfit(10)
    assert not Sparsity.parse("2:4").misfit(12)
    assert not Sparsity.parse("0.5").misfit(7)


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=12), ratio=st.floats(0.3, 0.7), ramp=st.floats(-0.6, 0.5)
)
def test_ramp_keeps_the_total_whatever_the_sizes_of_the_blocks(sizes: list[int], ratio: float, ramp: float) -> None:
    ends = [0, *accumulate(sizes)]
    spans = [(first / ends[-1], last / ends[-1]) for first, last in pairwise(ends)]
    ratios = [Sparsity(ratio).ramped(ramp, span).ratio for span in spans]
    assert sum(n * r for n, r in zip(sizes, ratios, strict=True)) / ends[-1] == pytest.approx(ratio, abs=1e-12)
    assert ratios == sorted(ratios, reverse=ramp < 0)
    assert max(ratios) - min(ratios) <= abs(ramp)


@pytest.mark.parametrize(("sparsity", "ramp"), [("2:4", 0.1), ("0.5", 1.2), ("0.1", -0.3), ("0.9", 0.2)])
def test_ramp_that_a_pattern_cannot_have_is_refused(sparsity: str, ramp: float) -> None:
    with pytest.raises(UserError, match=r"ramp"):
        Sparsity.parse(sparsity).check_ramp(ramp)


@pytest.mark.parametrize(
    ("sparsity", "ratios", "what"),
    [
        ("2:4", (0.4, 0.6), "same in every block"),
        ("2:4", "auto", "same in every block"),
        ("0", "auto", "no zeros"),
        ("0.5", (0.0, 1.0), r"\[0, 1\)"),
    ],
)
def test_ratios_that_blocks_cannot_have_are_refused(sparsity: str, ratios: tuple[float, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        Sparsity.parse(sparsity).check_ratios(ratios)
    Sparsity.parse(sparsity).check_ratios(())


@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (32, 32), (33, 1024), (300, 1001)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_that_are_not_zero_are_counted_as_torch_does(
    shape: tuple[int, int], share: float, dtype: torch.dtype
) -> None:
    values = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(dtype)
    values = values * -3
    assert count_nonzero(values) == int(values.count_nonzero())
    assert count_nonzero(values.T) == int(values.count_nonzero())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_zeroing_what_is_dropped_is_masked_fill(dtype, contiguous):
    values, keep = torch.randn(37, 53).to(dtype), torch.rand(37, 53) > 0.5
    values[0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1.0])
    expected = values.masked_fill(~keep, 0.0)
    if not contiguous:
        values, keep = values.T.contiguous().T, keep.T.contiguous().T
    zero_dropped(values, keep)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
