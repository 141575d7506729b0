"""The distance of stored weights from dense ones, where no rows tell what it does to outputs."""

from __future__ import annotations

import pytest
import torch

from llmcompress.core.kernels.distance_cpu import squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 37, 1024])
def test_squares_are_those_of_float64_for_any_number_of_threads(dtype: torch.dtype, columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    dense = torch.randn(columns, 300, generator=g).to(dtype).T  # not contiguous
    stored = dense.float() + torch.randn(300, columns, generator=g) / 100
    expected = ((dense.double() - stored.double()).square().sum(), dense.double().square().sum())
    found, threads = squares(dense, stored), torch.get_num_threads()
    assert found == pytest.approx([float(value) for value in expected], rel=1e-5)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert squares(dense, stored) == found
    finally:
        torch.set_num_threads(threads)
