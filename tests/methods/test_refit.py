"""Laws of fitting what a mask keeps: row by row the least squares of another library, whatever chose the zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.refit import Refit
from llmcompress.methods.rtn import RTN
from llmcompress.methods.wanda import Wanda

HALF = Sparsity.parse("0.5")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (6, 24), rows (300, 24), and the dense model's rows for the same tokens."""
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 24, generator=g) @ (torch.randn(24, 24, generator=g) / 5 + 0.5 * torch.eye(24))
    return torch.randn(6, 24, generator=g), dense + 0.1 * torch.randn(300, 24, generator=g), dense


def run(*methods: object) -> tuple[Matrix, MatrixGroup]:
    weight, x, dense = problem()
    group = MatrixGroup([Matrix("m", weight.clone())])
    stats = InputStats(24, frozenset().union(*(m.needs for m in methods)))  # type: ignore[attr-defined]
    stats.update(x, dense)
    run_methods(methods, group, stats)  # type: ignore[arg-type]
    return group.matrices[0], group


@pytest.mark.parametrize("first", [Magnitude(HALF), Wanda(HALF)])
@pytest.mark.parametrize("target", ["dense", "compressed"])
def test_survivors_are_the_least_squares_fit_to_the_dense_outputs(first: object, target: str) -> None:
    weight, x, dense = problem()
    matrix, _ = run(first, Refit(target=target, damping=1e-6))  # type: ignore[arg-type]
    assert matrix.keep is not None and int(matrix.keep.sum()) == 72 and (matrix.weight[~matrix.keep] == 0).all()
    outputs = ((dense if target == "dense" else x) @ weight.T).double()
    for row in range(6):
        kept = matrix.keep[row]
        best = torch.linalg.lstsq(x[:, kept].double(), outputs[:, row]).solution
        loss = (x[:, kept].double() @ matrix.weight[row, kept].double() - outputs[:, row]).square().sum()
        least = (x[:, kept].double() @ best - outputs[:, row]).square().sum()
        assert float(loss) <= 1.01 * float(least)


def test_without_zeros_nothing_changes_and_a_quantizer_aims_at_the_fit() -> None:
    weight, x, _ = problem()
    assert torch.equal(run(Refit())[0].weight, weight)
    grid = QuantGrid(4)
    swept, group = run(Magnitude(HALF), Refit(target="compressed"), GPTQ(grid))
    rounded = run(Magnitude(HALF), Refit(target="compressed"), RTN(grid))[1]
    assert swept.keep is not None and (swept.weight[~swept.keep] == 0).all()
    assert group.output_error(x, [weight]) < rounded.output_error(x, [weight])
