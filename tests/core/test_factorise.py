"""The one factorisation of the sweep: H + λI = V Vᵀ."""

from __future__ import annotations

import pytest
import torch

from llmcompress.core.sweep import _reverse, factorise
from llmcompress.errors import UserError

COLUMNS = 288


@pytest.mark.parametrize("tokens", [600, 20], ids=["definite", "rank-deficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_in_the_memory_of_the_gram_matrix_is_the_same(tokens, dtype):
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(0))
    H = x.T @ x / tokens
    apart = factorise(H, 1e-9, dtype)
    given = H.clone()
    inside = factorise(given, 1e-9, dtype, overwrite=True)
    assert torch.equal(inside.V, apart.V)
    assert inside.damping == apart.damping
    assert (inside.V.data_ptr() == given.data_ptr()) == (dtype == torch.float32)
    damped = H + apart.ridge * torch.eye(COLUMNS)
    assert torch.allclose(apart.V @ apart.V.T, damped, atol=1e-4 * float(H.diagonal().mean()))


@pytest.mark.parametrize("columns", [129, 512, 515, 1100])
def test_entries_in_the_opposite_order_are_both_axes_reversed(columns):
    matrix = torch.randn(columns, columns)
    assert torch.equal(_reverse(matrix.clone(), chunk=1000), matrix.flip(0, 1))


def test_damping_is_raised_until_the_factorisation_succeeds_and_reported():
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1.5  # eigenvalue −0.5
    factor = factorise(H, 0.01)
    assert factor.damping == pytest.approx(1.0)
    assert torch.allclose(factor.V @ factor.V.T, H + factor.ridge * torch.eye(16), atol=1e-5)


def test_damping_is_a_share_of_what_an_ordinary_channel_has():
    H = torch.diag(torch.tensor([4.0, 2.0, 8.0, 1e6, 6.0, 0.0]))
    factor = factorise(H, 0.1)
    assert factor.dead.tolist() == [False] * 5 + [True]
    assert factor.ridge == pytest.approx(1.6)  # 0.1 · (4 + 2 + 8 + 60 + 6) / 5
    assert torch.allclose(factor.V.diagonal().square(), torch.tensor([5.6, 3.6, 9.6, 1e6 + 1.6, 7.6, 17.6]))
    assert factorise(torch.diag(torch.tensor([4.0, 2.0, 9.0])), 0.1).ridge == pytest.approx(0.5)  # as in the papers


def test_channels_of_large_inputs_hardly_change_the_damping_of_others():
    x = torch.randn(600, COLUMNS, generator=torch.Generator().manual_seed(0))
    plain = factorise(x.T @ x / 600, 0.1).ridge
    x[:, :6] *= 1000
    assert plain < factorise(x.T @ x / 600, 0.1).ridge < 1.25 * plain


def test_damping_may_grow_until_it_exceeds_the_largest_channels():
    x = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    x[:, :16] = 1e7 * x[:, :1]  # what rounding leaves of one another is far more than other channels have
    H = x.T @ x / 8
    factor = factorise(H, 1e-3)
    assert factor.damping > 1e-3
    assert torch.isfinite(factor.V).all()


def test_double_precision_factors_what_single_cannot():
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).double()
    H = (x.T @ x).float()
    assert factorise(H, 1e-7, torch.float64).damping < factorise(H, 1e-7).damping or factorise(H, 1e-7).damping == 1e-7


def test_infinite_statistics_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        factorise(torch.full((4, 4), torch.nan))
