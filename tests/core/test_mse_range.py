"""The compiled range search takes the levels that the plain one takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.core.grid import QuantGrid
from llmcompress.core.kernels import mse_range


def loss(grid: QuantGrid, x: torch.Tensor, dtype: torch.dtype, ones: torch.Tensor | None) -> torch.Tensor:
    """(groups,) Σ|error|^2.4 in float64 of ``x`` on the grid fitted to it; weights of one mean the plain search."""
    levels = grid.fit(x, dtype, ones)
    lost = (grid.round(x, levels).double() - x.double()).abs().pow(2.4)
    return lost.sum().view(1) if grid.group == "tensor" else lost.unflatten(1, (*levels.scale.shape[1:], -1)).sum(-1)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from(["tensor", "channel", 8, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-6, 3),
    tail=st.sampled_from([1.0, 3.0]),
    zeros=st.booleans(),
    seed=st.integers(0, 999),
)
def test_compiled_search_loses_what_the_plain_one_loses(
    bits: int,
    symmetric: bool,
    group: str | int,
    dtype: torch.dtype,
    exponent: int,
    tail: float,
    zeros: bool,
    seed: int,
) -> None:
    grid = QuantGrid(bits, symmetric, group, observer="mse")
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(seed))
    x = x.sign() * x.abs().pow(tail) * 10.0**exponent
    x[2:4] *= not zeros
    compiled, plain = loss(grid, x, dtype, None), loss(grid, x, dtype, torch.ones(48))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["int4-g128-mse", "int3-g32-asym-mse", "int8-mse", "int2-tensor-mse"])
def test_compiled_search_takes_the_same_levels_whatever_the_threads(name: str) -> None:
    """Of 1,024 columns in a transposed matrix, and so of sums in pieces."""
    grid, x = QuantGrid.parse_weights(name), torch.randn(1024, 40, generator=torch.Generator().manual_seed(5)).T
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(grid.fit(x, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    plain = grid.fit(x, torch.bfloat16, torch.ones(1024))
    for levels in found:
        assert torch.equal(levels.scale, plain.scale)
        assert grid.symmetric or torch.equal(levels.zero_point, plain.zero_point)


def test_power_is_as_exact_as_float32() -> None:
    error = torch.logspace(-12, 9, 5000).numpy()
    power = np.array([mse_range._loss(e) for e in error], np.float64)
    np.testing.assert_allclose(power, error.astype(np.float64) ** 2.4, rtol=1e-6)
    assert mse_range._loss(np.float32(0)) == 0
