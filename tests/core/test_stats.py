"""Laws of the statistics: sums over rows, in any grouping and after any rescaling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.core.stats import KINDS, InputStats

OWN = KINDS - {"cross"}  # of the rows alone
READ = ("absmax", "low", "high", "mean", "mean_abs", "rms", "gram")


def gather(pieces: list[torch.Tensor], clip: float = math.inf) -> InputStats:
    stats = InputStats(pieces[0].shape[1], OWN, clip=clip)
    for piece in pieces:
        stats.update(piece)
    return stats


def directly(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics by their definition in float64."""
    x = x.double()
    return {
        "absmax": x.abs().amax(0),
        "low": x.amin(0).clamp(max=0),
        "high": x.amax(0).clamp(min=0),
        "mean": x.mean(0),
        "mean_abs": x.abs().mean(0),
        "rms": x.square().mean(0).sqrt(),
        "gram": x.T @ x / len(x),
    }


def assert_same(stats: InputStats, expected: dict[str, torch.Tensor]) -> None:
    for kind in READ:
        found = getattr(stats, kind)
        assert found.dtype == torch.float32
        # sums of opposite signs cancel: the error is relative to what was summed
        scale = float(expected["gram" if kind == "gram" else "absmax"].abs().max()) + 1e-12
        torch.testing.assert_close(found.double(), expected[kind], rtol=1e-5, atol=2e-6 * scale, msg=kind)


SHAPE = {
    "tokens": st.integers(1, 60),
    "width": st.integers(1, 20),
    "pieces": st.integers(1, 5),
    "seed": st.integers(0, 999),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPE)
def test_statistics_equal_their_definition_in_any_pieces(tokens: int, width: int, pieces: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 3
    stats = gather(list(x.chunk(pieces)))
    assert stats.count == tokens
    assert_same(stats, directly(x))


@settings(max_examples=60, deadline=None)
@given(**SHAPE)
def test_merge_equals_update_on_the_concatenation(tokens: int, width: int, pieces: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    merged = InputStats(width, OWN)
    for piece in x.chunk(pieces):
        merged.merge(gather([piece]))
    whole = gather([x])
    assert merged.count == whole.count
    assert torch.equal(torch.cat(merged.rows), x)
    assert_same(merged, directly(x))


@settings(max_examples=60, deadline=None)
@given(**SHAPE)
def test_rescale_gives_the_statistics_of_the_scaled_rows(tokens: int, width: int, pieces: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, s, u = torch.randn(tokens, width, generator=g), *(torch.rand(2, width, generator=g) + 0.2)
    stats = gather(list(x.chunk(pieces)))
    stats.rescale(s)
    stats.rescale(u)
    assert_same(stats, directly(x / s / u))
    torch.testing.assert_close(torch.cat(list(stats.iter_rows())), x / s / u)


@pytest.mark.parametrize("clip", [0.1, 1.0, math.inf])
def test_clipped_statistics_are_those_of_clamped_rows(clip: float) -> None:
    x = torch.randn(50, 6)
    stats = gather(list(x.chunk(3)), clip)
    assert_same(stats, directly(x.clamp(-clip, clip)))
    assert torch.equal(torch.cat(list(stats.iter_rows())), x.clamp(-clip, clip))


def test_bfloat16_rows_are_summed_in_float32() -> None:
    x = torch.randn(500, 12).bfloat16()
    assert_same(gather([x]), directly(x.float()))


def test_cross_is_the_product_with_the_dense_rows() -> None:
    x, dense = torch.randn(40, 5), torch.randn(40, 5)
    stats = InputStats(5, {"cross"})
    stats.update(x[:10], dense[:10])
    stats.update(x[10:], dense[10:])
    torch.testing.assert_close(stats.cross, dense.T @ x / 40)
    with pytest.raises(ValueError, match="dense"):
        stats.update(x)


def test_no_rows_leave_zero_statistics() -> None:
    stats = gather([torch.empty(0, 4)])
    assert stats.count == 0
    for kind in READ:
        assert not getattr(stats, kind).any()


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        InputStats(4, {"median"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [{"squares"}, {"squares", "gram"}])
def test_squares_are_those_of_float64(dtype: torch.dtype, kinds: set[str]) -> None:
    x = (torch.randn(3000, 700, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    stats = InputStats(700, kinds)
    stats.update(x[:1700])
    stats.update(x[1700:].T.contiguous().T)  # not contiguous
    expected = x.double().square().mean(0).sqrt()
    torch.testing.assert_close(stats.rms.double(), expected, rtol=2e-5, atol=0)
