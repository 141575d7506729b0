"""Steps where rows are scarce."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.omniquant import LearnedQuant, OmniQuant
from llmcompress.methods.rtn import RTN
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.methods.uncalibrated import RIDGE, steadied, without_rows

HALF, INT4 = Sparsity.parse("0.5"), QuantGrid(4, True, 32)


def held_out_error(methods: tuple[Method, ...], rows: int, width: int = 128) -> float:
    """‖X(W − Q)ᵀ‖² / ‖XWᵀ‖² on rows that no step has seen, of inputs with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0] * torch.linspace(1, 0.05, width)
    x = torch.randn(rows + 512, width, generator=generator) @ mixing.T
    weight = torch.randn(96, width, generator=generator)
    stats = InputStats(width, frozenset().union(*(m.needs for m in methods)))
    stats.update(x[:rows])
    matrix = Matrix("m", weight.clone())
    run_methods(methods, MatrixGroup([matrix]), stats)
    test = x[rows:]
    return float((test @ (weight - matrix.weight).T).square().sum() / (test @ weight.T).square().sum())


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_damping_makes_compensation_on_few_rows_better_than_none(rows: int) -> None:
    for method, plain in ((SparseGPT(HALF), Magnitude(HALF)), (GPTQ(INT4), RTN(INT4))):
        steady = held_out_error(steadied((method,), 128, rows), rows)
        assert steady < held_out_error((plain,), rows)
        assert steady <= held_out_error((method,), rows)


def test_damping_is_only_raised_and_not_where_rows_abound() -> None:
    method = SparseGPT(HALF, damping=0.1)
    assert steadied((method,), 128, 128) == (replace(method, damping=RIDGE),)
    assert steadied((method,), 128, 100_000) == (method,)
    assert steadied((Magnitude(HALF),), 128, 1) == (Magnitude(HALF),)


def test_without_rows_sparsity_and_grid_stay() -> None:
    steps = (SparseGPT(HALF), GPTQ(INT4, QuantGrid(8, True, "token", True)))
    pruned, rounded = without_rows(steps, "m")
    assert pruned == Magnitude(HALF)
    assert rounded == RTN(INT4, QuantGrid(8, True, "token", True))


def test_without_rows_learned_ranges_give_way_to_rounding_and_static_inputs_are_refused() -> None:
    learned = LearnedQuant(OmniQuant(INT4, QuantGrid(8, True, "token", True)), {}, {})
    assert without_rows((learned,), "m") == (RTN(INT4, QuantGrid(8, True, "token", True)),)
    static = LearnedQuant(OmniQuant(INT4, QuantGrid.parse_activations("int8-static")), {}, {})
    with pytest.raises(UserError, match="too few calibration tokens"):
        without_rows((static,), "m")
