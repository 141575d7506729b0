"""How large the inputs of a group get, and what a profile keeps of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.core.profile import BINS, channel_peaks, decoded, described, encoded, outlier_ratio


def test_a_peak_is_the_largest_magnitude_of_its_channel() -> None:
    rows = [torch.randn(7, 5), torch.randn(0, 5), -3 * torch.rand(4, 5)]
    assert torch.equal(channel_peaks(rows), torch.cat(rows).abs().amax(0))
    assert torch.equal(channel_peaks([torch.zeros(0, 5)]), torch.zeros(5))


@given(st.integers(1, 3 * BINS), st.integers(0, 2**31))
def test_a_profile_holds_the_largest_peak_of_each_run_within_five_per_cent(width: int, seed: int) -> None:
    peaks = torch.rand(width, generator=torch.Generator().manual_seed(seed)).add(0.01).mul(100)
    found = decoded(encoded(peaks))
    bins = min(BINS, width)
    runs = [[j for j in range(width) if j * bins // width == i] for i in range(bins)]
    assert found == pytest.approx([max(float(peaks[j]) for j in run) for run in runs], rel=0.05)


def test_a_channel_that_is_never_active_does_not_break_a_profile() -> None:
    assert decoded(encoded(torch.zeros(4))) == [2.0**-16] * 4
    assert outlier_ratio(torch.zeros(4)) == 1.0


def test_the_profile_after_smoothing_is_that_of_the_divided_inputs() -> None:
    peaks, s = torch.tensor([1.0, 1.0, 64.0]), torch.tensor([1.0, 1.0, 32.0])
    found = described(peaks, s)
    assert found["channels"] == 3 and found["outlier_ratio"] == {"before": 64.0, "after": 2.0}
    assert decoded(found["after"]) == [1.0, 1.0, 2.0]
    assert "after" not in described(peaks, None)
