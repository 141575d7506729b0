"""Laws of the activation-range salience, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.core.kernels import range_scan
from llmcompress.core.salience import CentredRows, RangeScan, averaged_samples, raise_extremes, range_excess
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError


def stats_of(x: torch.Tensor, pieces: int = 1, **kwargs: float) -> InputStats:
    stats = InputStats(x.shape[1], {"rows"}, **kwargs)
    for piece in x.chunk(pieces):
        stats.update(piece)
    return stats


def excess_by_definition(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SS − range(Y_r) of every weight, and range(Y_r), in float64."""
    w, x = weight.double(), x.double()
    y = x @ w.T  # (tokens, out)
    without = y[:, :, None] - x[:, None, :] * w[None]  # (tokens, out, in)
    span = y.amax(0) - y.amin(0)
    return without.amax(0) - without.amin(0) - span[:, None], span[:, None]


def assert_exact(weight: torch.Tensor, x: torch.Tensor, found: torch.Tensor) -> None:
    """To 1e-5 of the range, or, where terms cancel to next to none, to what float32 holds of their sum."""
    expected, span = excess_by_definition(weight, x)
    terms = weight.double().abs() @ (x.double() - x.double().mean(0)).abs().amax(0)  # (out,)
    allowed = 1e-5 * span + 4 * torch.finfo(torch.float32).eps * terms[:, None]
    assert ((found.double() - expected).abs() <= allowed + 1e-30).all()


def draw(kind: str, tokens: int, width: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=generator)
    if kind == "ties":
        x = torch.randint(-1, 2, (tokens, width), generator=generator).float()
    elif kind == "heavy":
        x = x / torch.randn(tokens, width, generator=generator)
    elif kind == "outlier inputs":
        x[:, ::3] *= 100
    elif kind == "massive tokens":
        x[:: max(tokens // 3, 1)] *= 1000
    elif kind == "large mean":
        x = x + 300
    elif kind == "positive":
        x = x.abs()
    return x


KINDS = ("normal", "ties", "heavy", "outlier inputs", "massive tokens", "large mean", "positive")


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 70),
    out=st.integers(1, 9),
    width=st.integers(1, 40),
    chunk=st.integers(1, 80),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_salience_equals_its_definition_for_any_shape_data_and_chunking(
    kind: str, tokens: int, out: int, width: int, chunk: int, pieces: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = draw(kind, tokens, width, g), torch.randn(out, width, generator=g)
    weight[torch.rand(out, width, generator=g) < 0.2] = 0
    rows = CentredRows(stats_of(x, pieces), chunk_bytes=4 * width * chunk)
    assert_exact(weight, x, range_excess(weight, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_salience_is_exact_over_many_tokens_and_several_row_blocks(kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    x, weight = draw(kind, 3000, 48, g), torch.randn(70, 48, generator=g)
    assert_exact(weight, x, range_excess(weight, CentredRows(stats_of(x, 3))))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_scan_equals_the_compiled_one(kind: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, weight = draw(kind, 60, 24, g), torch.randn(10, 24, generator=g)
    peaks = torch.full((2, 10), -torch.inf)
    best = torch.full((2, 10, 24), -torch.inf)
    for chunk in (x - x.mean(0)).split(25):
        raise_extremes(weight @ chunk.T, chunk, weight, peaks, best)
    assert_exact(weight, x, best.sum(0))


def test_constant_rows_have_no_range_and_no_excess() -> None:
    x = torch.full((50, 8), 0.1) * torch.arange(1, 9)
    assert torch.equal(range_excess(torch.randn(4, 8), CentredRows(stats_of(x, 3))), torch.zeros(4, 8))


def test_removing_a_zero_weight_changes_nothing() -> None:
    x, weight = torch.randn(40, 8), torch.randn(4, 8)
    weight[:, 3] = 0
    assert (range_excess(weight, CentredRows(stats_of(x)))[:, 3] == 0).all()


def test_no_tokens_give_no_excess() -> None:
    assert torch.equal(range_excess(torch.randn(3, 4), CentredRows(stats_of(torch.empty(0, 4)))), torch.zeros(3, 4))


def test_salience_sees_clipped_and_smoothed_rows() -> None:
    x, weight, s = torch.randn(64, 8), torch.randn(5, 8), torch.rand(8) + 0.5
    stats = stats_of(x, clip=1.0)
    stats.rescale(s)
    assert_exact(weight, x.clamp(-1, 1) / s, range_excess(weight, CentredRows(stats)))


def test_bfloat16_rows_count_with_their_own_values() -> None:
    x, weight = torch.randn(64, 8).bfloat16(), torch.randn(5, 8)
    assert_exact(weight, x.float(), range_excess(weight, CentredRows(stats_of(x, 2))))


def test_rows_are_left_as_they_were() -> None:
    x = torch.randn(20, 8)
    before = x.clone()
    range_excess(torch.randn(4, 8), CentredRows(stats_of(x)))
    assert torch.equal(x, before)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 20), width=st.integers(1, 150), seed=st.integers(0, 99))
def test_column_extremes_are_the_two_largest_either_way(tokens: int, width: int, seed: int) -> None:
    x = torch.randint(-9, 9, (tokens, width), generator=torch.Generator().manual_seed(seed)).float()
    found = range_scan.column_extremes(x)
    for side, signed in enumerate((-x, x)):
        ordered = signed.sort(0, descending=True).values
        assert torch.equal(found.first[side], ordered[0])
        assert torch.equal(found.second[side], ordered[min(1, tokens - 1)])
        assert torch.equal(signed.gather(0, found.token[side].long()[None])[0], ordered[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_does_not_change_a_bit(threads: int) -> None:
    g = torch.Generator().manual_seed(7)
    x, weight = torch.randn(200, 150, generator=g), torch.randn(9, 150, generator=g)
    before = torch.get_num_threads()
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        y = torch.stack([(x * w).sum(1) for w in weight])
        peaks, best = torch.full((2, 9), -torch.inf), torch.full((2, 9, 150), -torch.inf)
        range_scan.raise_extremes(y.contiguous(), x, weight, range_scan.column_extremes(x), peaks, best)
        found.append(best.sum(0))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert_exact(weight, x, found[0])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("cut", [1, 20, 49])
def test_scans_of_different_tokens_merge_to_the_scan_of_all(compiled: bool, cut: int) -> None:
    generator = torch.Generator().manual_seed(cut)
    weight, x = torch.randn(7, 30, generator=generator), draw("heavy", 50, 30, generator)

    def scan(*parts: torch.Tensor) -> RangeScan:
        found = RangeScan(weight)
        for part in parts:
            found.add(part, range_scan.column_extremes(part) if compiled else None)
        return found

    one, other = scan(x[:cut].contiguous()), scan(x[cut:].contiguous())
    one.merge(other)
    torch.testing.assert_close(one.excess, scan(x).excess, rtol=1e-5, atol=1e-5)
    assert_exact(weight, x, one.excess)


def test_averaged_samples_are_averaged_token_by_token_before_the_range_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, weight = torch.randn(6, 20, 12, generator=generator), torch.randn(5, 12, generator=generator)
    stats = InputStats(12, {"rows"}, length=20)
    for pair in samples.split(2):
        stats.update(pair.reshape(-1, 12))
    assert_exact(weight, samples.mean(0), range_excess(weight, CentredRows(averaged_samples(stats))))
    stats.update(torch.zeros(3, 12))
    with pytest.raises(UserError, match="whole samples"):
        averaged_samples(stats)
