"""Laws of the methods that need one pass and no inverse: magnitude, Wanda, SmoothQuant, rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import held_and_fit
from llmcompress.errors import UserError
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.rtn import RTN
from llmcompress.methods.smoothquant import AUTO_ALPHA, SmoothQuant
from llmcompress.methods.wanda import Wanda

IN = 24
INT8 = QuantGrid.parse_activations("int8")


def inputs(tokens: int = 80, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, IN, generator=g) * torch.logspace(-1, 2, IN)


def group_of(*heights: int, seed: int = 1) -> MatrixGroup:
    g = torch.Generator().manual_seed(seed)
    return MatrixGroup([Matrix(f"m{i}", torch.randn(height, IN, generator=g)) for i, height in enumerate(heights)])


def stats_of(x: torch.Tensor, *kinds: str) -> InputStats:
    stats = InputStats(IN, kinds)
    for piece in x.chunk(3):
        stats.update(piece)
    return stats


def test_wanda_mask_equals_its_definition() -> None:
    x, group = inputs(), group_of(10, 6)
    dense = [m.weight for m in group]
    Wanda(Sparsity(0.5)).apply(group, stats_of(x, "squares"))
    for matrix, weight in zip(group, dense, strict=True):
        norms = [math.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j in range(IN)]
        for r in range(len(weight)):
            order = sorted(range(IN), key=lambda j: abs(float(weight[r, j])) * norms[j])
            expected = torch.ones(IN, dtype=torch.bool)
            expected[order[: IN // 2]] = False
            assert torch.equal(matrix.keep[r], expected)
            assert torch.equal(matrix.weight[r], torch.where(expected, weight[r], 0.0))


def test_wanda_two_four_drops_the_two_weakest_of_every_four() -> None:
    x, group = inputs(), group_of(7)
    score = group.matrices[0].weight.abs() * x.square().sum(0).sqrt()
    Wanda(Sparsity.parse("2:4")).apply(group, stats_of(x, "squares"))
    for values, kept in zip(score.view(-1, 4), group.matrices[0].keep.view(-1, 4), strict=True):
        assert kept.sum() == 2
        assert values[kept].min() >= values[~kept].max()


def test_wanda_on_equal_inputs_is_magnitude() -> None:
    ones, a, b = torch.ones(5, IN), group_of(8), group_of(8)
    Wanda(Sparsity(0.5)).apply(a, stats_of(ones, "squares"))
    Magnitude(Sparsity(0.5)).apply(b, stats_of(ones))
    assert torch.equal(a.matrices[0].keep, b.matrices[0].keep)


def test_magnitude_needs_no_statistics_and_keeps_the_largest() -> None:
    group = group_of(9)
    dense = group.matrices[0].weight
    Magnitude(Sparsity(0.25)).apply(group, InputStats(IN, ()))
    kept = group.matrices[0].keep
    assert ((~kept).sum(1) == 6).all()
    for row, stays in zip(dense.abs(), kept, strict=True):
        assert row[stays].min() >= row[~stays].max()


def test_second_pruning_never_brings_a_weight_back() -> None:
    x, group = inputs(), group_of(8)
    Wanda(Sparsity(0.25)).apply(group, stats_of(x, "squares"))
    first = group.matrices[0].keep
    Magnitude(Sparsity(0.5)).apply(group, InputStats(IN, ()))
    second = group.matrices[0].keep
    assert not (second & ~first).any()
    assert ((~second).sum(1) == IN // 2).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_scale_equals_its_formula_over_all_readers(alpha: float) -> None:
    x, group = inputs(), group_of(10, 6)
    group.bystanders = [Matrix("router", torch.randn(3, IN) * 5)]
    everyone = torch.cat([m.weight for m in (*group.matrices, *group.bystanders)])
    SmoothQuant(alpha).apply(group, stats_of(x, "absmax"))
    expected = torch.tensor(
        [float(x[:, j].abs().max()) ** alpha / float(everyone[:, j].abs().max()) ** (1 - alpha) for j in range(IN)]
    )
    torch.testing.assert_close(group.smoothing, expected)


def test_smoothing_leaves_every_product_unchanged() -> None:
    x, group = inputs(), group_of(10, 6)
    group.bystanders = [Matrix("router", torch.randn(3, IN))]
    readers = [*group.matrices, *group.bystanders]
    before = [x.double() @ m.weight.double().T for m in readers]
    SmoothQuant(0.8).apply(group, stats_of(x, "absmax"))
    for matrix, y in zip(readers, before, strict=True):
        after = (x.double() / group.smoothing.double()) @ matrix.weight.double().T
        torch.testing.assert_close(after, y, rtol=1e-5, atol=1e-4)


def test_refused_fold_leaves_all_as_it_was() -> None:
    group = group_of(5)
    group.fold_refusal = "its norm feeds a reader that is not a matrix"
    weight = group.matrices[0].weight
    SmoothQuant(0.5).apply(group, stats_of(inputs(), "absmax"))
    assert group.smoothing is None
    assert torch.equal(group.matrices[0].weight, weight)


def test_dead_inputs_are_not_scaled() -> None:
    x, group = inputs(), group_of(5)
    x[:, 3] = 0
    SmoothQuant(0.5).apply(group, stats_of(x, "absmax"))
    assert group.smoothing[3] == 1
    assert torch.isfinite(group.smoothing).all()


@pytest.mark.parametrize("grid", ["int8", "int4-g8", "int4-asym", "int3-g12-asym", "int2", "int8-tensor"])
def test_rounded_weights_lie_on_their_grid(grid: str) -> None:
    group = group_of(10, 6)
    dense = [m.weight for m in group]
    RTN(QuantGrid.parse_weights(grid)).apply(group, InputStats(IN, ()))
    for matrix, weight in zip(group, dense, strict=True):
        stored = matrix.quantized
        low, high = stored.grid.range
        assert torch.equal(matrix.weight, stored.dequantize())
        assert stored.codes.min() >= low
        assert stored.codes.max() <= high
        columns = IN // stored.levels.scale.shape[1]
        scale = stored.levels.scale.expand(len(weight), -1).repeat_interleave(columns, 1)
        zero = 0 if stored.levels.zero_point is None else stored.levels.zero_point
        zero = zero if isinstance(zero, int) else zero.expand(len(weight), -1).repeat_interleave(columns, 1)
        steps = matrix.weight / scale + zero
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_static_activation_levels_cover_the_calibrated_range() -> None:
    x, group = inputs(), group_of(5)
    method = RTN(QuantGrid(), QuantGrid.parse_activations("int8-static"))
    method.apply(group, stats_of(x, *method.needs))
    expected = max(-float(x.min()), float(x.max())) / 127.5
    assert float(group.activation_levels.scale) == pytest.approx(expected)


@pytest.mark.parametrize("weights", ["int8", "int4-g8-asym"])
@pytest.mark.parametrize("prune", [Wanda(Sparsity(0.5)), Wanda(Sparsity.parse("2:4")), Magnitude(Sparsity(0.5))])
def test_pruned_weights_stay_zero_through_smoothing_and_rounding(prune: Wanda | Magnitude, weights: str) -> None:
    group = group_of(10, 6)
    methods = (prune, SmoothQuant(0.8), RTN(QuantGrid.parse_weights(weights), INT8))
    run_methods(methods, group, stats_of(inputs(), "squares", "absmax"))
    for matrix in group:
        assert (~matrix.keep).sum() == matrix.weight.numel() // 2
        assert (matrix.weight[~matrix.keep] == 0).all()


def test_smoothing_rescues_rounding_from_outlier_inputs() -> None:
    x, dense = inputs(), [m.weight for m in group_of(40)]
    errors = []
    for methods in ((RTN(QuantGrid(), INT8),), (SmoothQuant(0.5), RTN(QuantGrid(), INT8))):
        group = group_of(40)
        run_methods(methods, group, stats_of(x, "absmax"))
        errors.append(group.output_error(x, dense))
    assert errors[1] < 0.5 * errors[0]


def test_auto_alpha_has_the_least_error_of_all_on_held_back_rows() -> None:
    x, dense = inputs(400), [m.weight.double() for m in group_of(10, 6)]
    group, quantize = group_of(10, 6), RTN(QuantGrid.parse_weights("int6"), INT8)
    run_methods((SmoothQuant("auto"), quantize), group, stats_of(x, "absmax", "rows"))
    held, _ = held_and_fit(list(x.chunk(3)), 1)
    errors: dict[float | None, float] = {}
    for alpha in (None, *AUTO_ALPHA):
        trial = group_of(10, 6)
        steps = (quantize,) if alpha is None else (SmoothQuant(alpha), quantize)
        run_methods(steps, trial, stats_of(x, "absmax"))
        seen = INT8.round_activations(held if alpha is None else held / trial.smoothing).double()
        pairs = [(held.double() @ w.T, seen @ m.weight.double().T) for w, m in zip(dense, trial, strict=True)]
        lost, meant = sum((y - z).square().sum() for y, z in pairs), sum(y.square().sum() for y, _ in pairs)
        errors[alpha] = float(lost / meant)
    noted = group.figures["alpha_errors"]
    for alpha, error in errors.items():
        assert noted["none" if alpha is None else f"{alpha:g}"] == pytest.approx(error, rel=1e-3)
    assert group.figures["alpha"] == min(errors, key=errors.__getitem__)


def test_auto_alpha_without_anything_to_round_is_refused() -> None:
    with pytest.raises(UserError, match="quantize"):
        run_methods((SmoothQuant("auto"),), group_of(4), stats_of(inputs(), "absmax", "rows"))
