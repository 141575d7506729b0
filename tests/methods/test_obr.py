"""Laws of OBR: both compensations are the rows' least-squares optima, and what comes out is sparse and on the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.core.compensate import LeastSquares
from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods.obr import LEAST_GAIN, OBR
from llmcompress.methods.rtn import RTN
from llmcompress.methods.smoothquant import SmoothQuant
from llmcompress.methods.wanda import Wanda

COLUMNS = 64
GRIDS = ("int8", "int4", "int4-g16", "int4-g16-asym", "int8-tensor")
TOKENWISE = QuantGrid.parse_activations("int8")


def rows(tokens: int = 400) -> Tensor:
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=random) / COLUMNS**0.5 + 0.4 * torch.eye(COLUMNS)
    return torch.randn(tokens, COLUMNS, generator=random) @ mixing


def group_of(*heights: int) -> MatrixGroup:
    random = torch.Generator().manual_seed(1)
    return MatrixGroup([Matrix(f"m{i}", torch.randn(h, COLUMNS, generator=random)) for i, h in enumerate(heights)])


def run(*methods: Method, heights: tuple[int, ...] = (12, 5)) -> MatrixGroup:
    group = group_of(*heights)
    stats = InputStats(COLUMNS, frozenset().union(*(m.needs for m in methods)))
    stats.update(rows())
    run_methods(methods, group, stats)
    return group


def damped_gram(damping: float = 0.01) -> Tensor:
    x = rows().double()
    H = x.T @ x / len(x)
    return H + damping * H.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)


def optimum(w: Tensor, H: Tensor, free: Tensor, fixed: Tensor) -> Tensor:
    """One row of −(H_RR)⁻¹ H_RE e_E: the entries ``free`` in answer to the errors of the ``fixed`` values."""
    answer, error = fixed.clone(), (fixed - w)[~free]
    answer[free] = w[free] - torch.linalg.solve(H[free][:, free], H[free][:, ~free] @ error)
    return answer


def losses(Q: Tensor, W: Tensor, H: Tensor) -> Tensor:
    """(out,) of each row."""
    E = Q.double() - W.double()
    return ((E @ H) * E).sum(1)


@pytest.mark.parametrize("fixed", ["pruned", "first columns rounded"])
def test_rows_are_compensated_to_their_float64_optimum(fixed: str) -> None:
    W, H = group_of(40).matrices[0].weight, damped_gram()
    free = W.abs() > 0.6 if fixed == "pruned" else (torch.arange(COLUMNS) >= COLUMNS // 2).expand_as(W)
    start = W * free if fixed == "pruned" else torch.where(free, W, (2 * W).round() / 2)
    x = rows()
    problem = LeastSquares(W, x.T @ x / len(x), float(0.01 * (x * x).mean()))
    restored, loss = problem.refit(free, start, LEAST_GAIN)
    expected = torch.stack([optimum(*row) for row in zip(W.double(), [H] * 40, free, start.double(), strict=True)])
    best = losses(expected, W, H)
    assert torch.equal(restored[~free], start[~free])
    assert (losses(restored, W, H) <= best * 1.001).all()
    assert (best < losses(start, W, H)).all()
    torch.testing.assert_close(loss.double(), losses(restored, W, H), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_obr_loses_as_little_as_the_paper_row_by_row_in_float64(grid: str, pattern: str) -> None:
    quant, H = QuantGrid.parse_weights(grid), damped_gram()
    group = run(Wanda(Sparsity.parse(pattern)), OBR(quant), heights=(60,))
    keep, Q = group.matrices[0].keep, group.matrices[0].weight
    W, last = group_of(60).matrices[0].weight.double(), torch.arange(COLUMNS) >= COLUMNS // 2
    pruned = torch.stack([optimum(w, H, k, torch.zeros_like(w)) for w, k in zip(W, keep, strict=True)])
    first = torch.where(last, pruned, quant.round(pruned.float(), quant.fit(pruned.float())).double())
    rest = torch.stack([optimum(w, H, k & last, q) for w, k, q in zip(W, keep, first, strict=True)]).float()
    levels = quant.fit(torch.where(last, rest, pruned.float()) if isinstance(quant.group, int) else pruned.float())
    paper = torch.where(last, quant.round(rest, levels), first.float())
    assert losses(Q, W, H).sum() == pytest.approx(float(losses(paper, W, H).sum()), rel=0.02)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("activations", [None, TOKENWISE])
def test_restoring_loses_less_than_rounding_the_same_mask(grid: str, activations: QuantGrid | None) -> None:
    quant, x = QuantGrid.parse_weights(grid), rows()
    dense = [m.weight for m in group_of(40)]
    for pattern in ("0.5", "2:4"):
        prune = Wanda(Sparsity.parse(pattern))
        restored, plain = (run(prune, m(quant, activations), heights=(40,)) for m in (OBR, RTN))
        assert torch.equal(restored.matrices[0].keep, plain.matrices[0].keep)
        assert restored.output_error(x, dense) < 0.8 * plain.output_error(x, dense)


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_are_exact_and_values_are_on_the_grid(grid: str) -> None:
    quant = QuantGrid.parse_weights(grid)
    for matrix in run(Wanda(Sparsity.parse("2:4")), SmoothQuant(0.5), OBR(quant, TOKENWISE)):
        assert (matrix.weight[~matrix.keep] == 0).all()
        assert (matrix.keep.view(-1, 4).sum(1) == 2).all()
        codes, levels = matrix.quantized.codes, matrix.quantized.levels
        assert torch.equal(quant.dequantize(codes, levels), matrix.weight)
        assert int(codes.min()) >= quant.range[0]
        assert int(codes.max()) <= quant.range[1]


def test_rounding_error_of_the_first_columns_is_given_back_by_the_last() -> None:
    x, dense = rows(), [m.weight for m in group_of(40)]
    quant = QuantGrid.parse_weights("int4-g16")
    restored, plain = run(OBR(quant), heights=(40,)), run(RTN(quant), heights=(40,))
    assert torch.equal(restored.matrices[0].weight[:, : COLUMNS // 2], plain.matrices[0].weight[:, : COLUMNS // 2])
    assert restored.output_error(x, dense) < plain.output_error(x, dense)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5])
def test_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        OBR(QuantGrid(), share=share)
