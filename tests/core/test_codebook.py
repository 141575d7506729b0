"""Laws of the grids that are tables: the formula of each kind in plain float64, brute force over scales, and the same
values from the compiled sweep as from its definition."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.core.codebook import best_scale, codebook, float_table
from llmcompress.core.floats import float_codes, float_values
from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.sweep import factorise, sweep, sweep_reference
from llmcompress.core.targets import Mask, Round
from llmcompress.errors import UserError

TABLES = ["power4", "power3-g48", "log4", "log6-g24", "codebook3", "codebook4-g96", "fp8", "mxfp4"]


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g)
    weight[torch.rand(rows, columns, generator=g) < 0.2] = 0
    return weight


@pytest.mark.parametrize("bits", range(2, 9))
def test_powers_of_two_are_sign_times_two_to_the_rounded_logarithm(bits: int) -> None:
    grid, weight = QuantGrid.parse_weights(f"power{bits}"), weight_of(6, 96, bits)
    rounded = grid.round(weight, grid.fit(weight))
    for row, found in zip(weight.double().tolist(), rounded.double().tolist(), strict=True):
        top = round(math.log2(max(map(abs, row))))
        for w, q in zip(row, found, strict=True):
            power = -math.inf if w == 0 else round(math.log2(abs(w)))
            assert q == (math.copysign(2.0**power, w) if power > top - (2 ** (bits - 1) - 1) else 0.0)


@pytest.mark.parametrize("word", ["log4", "log8", "codebook2", "codebook5", "codebook8"])
def test_every_weight_goes_to_the_nearest_level_and_half_of_the_table_is_the_other_mirrored(word: str) -> None:
    grid, weight = QuantGrid.parse_weights(word), weight_of(5, 64)
    levels = grid.fit(weight)
    assert grid.table is not None and len(grid.table.values) == 2**grid.bits - 1
    assert torch.equal(grid.table.values, -grid.table.values.flip(0))
    reach = (weight[:, :, None].double() - levels.scale[..., None].double() * grid.table.values.double()).abs()
    error = (grid.round(weight, levels).double() - weight.double()).abs()
    torch.testing.assert_close(error, reach.amin(-1), rtol=1e-5, atol=1e-7)


def test_logarithmic_levels_are_half_powers_of_two() -> None:
    table = codebook("log", 4)
    expected = torch.tensor([2.0 ** (-k / 2) for k in range(6, -1, -1)])
    torch.testing.assert_close(table.values[8:], expected)


@pytest.mark.parametrize("values", [(-1.0, 0.0, 1.0), (-3.0, -0.5, 0.0, 0.25, 1.0), (0.0, 1.0, 4.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_is_the_best_of_all_scales(values: tuple[float, ...], weighted: bool) -> None:
    x, table = weight_of(8, 12, seed=3), codebook("codebook", 3, values)
    h = torch.rand(8, 12, generator=torch.Generator().manual_seed(4)) if weighted else torch.ones(8, 12)
    found = best_scale(x, table, h if weighted else None).double()

    def loss(scale: torch.Tensor) -> torch.Tensor:  # (..., rows) by the definition
        reach = (x.double()[..., None] - scale[..., None, None] * table.values.double()).square().amin(-1)
        return (h * reach).sum(-1)

    trials = torch.linspace(1e-3, 4, 8000, dtype=torch.float64)[:, None].expand(-1, 8)
    assert (loss(found) <= loss(trials).amin(0) + 1e-9).all()


def test_levels_for_normal_weights_lose_less_of_them_than_even_or_logarithmic_ones() -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    losses = []
    for word in ("codebook4", "int4-mse", "log4", "power4"):
        grid = QuantGrid.parse_weights(word)
        losses.append(float((grid.round(weight, grid.fit(weight)) - weight).square().sum()))
    assert losses == sorted(losses)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "mxfp4"])
def test_the_table_of_small_floats_rounds_as_their_arithmetic(kind: str) -> None:
    table = float_table(kind)
    x = torch.cat(
        [torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 20, (table.values[1:] + table.values[:-1]) / 2]
    )
    assert torch.equal(table.values[table.index(x)], float_values(kind, float_codes(kind, x)))


@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4"])
@pytest.mark.parametrize("word", TABLES)
def test_the_compiled_sweep_equals_the_reference_on_a_table(word: str, sparsity: str | None) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 96, generator=g) @ (torch.randn(96, 96, generator=g) / 10 + 0.3 * torch.eye(96))
    weight, factor = torch.randn(40, 96, generator=g), factorise(x.T @ x / 300)
    grid = QuantGrid.parse_weights(word)

    def targets() -> tuple[Mask | None, Round]:
        mask = None if sparsity is None else Mask(Sparsity.parse(sparsity), factor.V.diagonal(), len(weight))
        return mask, Round(grid, weight, torch.float32, mask)

    fast, slow = targets(), targets()
    Q = sweep(weight, factor, *fast)
    expected = sweep_reference(weight, factor, [t for t in slow if t is not None])
    alike = ((Q - expected).abs() < 1e-4).all(1)  # a tie broken otherwise sends its row another way
    errors = [float((E @ factor.V).square().sum()) for E in (Q - weight, expected - weight)]
    assert alike.float().mean() > 0.7 and errors[0] == pytest.approx(errors[1], rel=0.01)
    stored = QuantizedWeight(grid.quantize(Q, fast[1].levels), fast[1].levels, grid)
    torch.testing.assert_close(stored.dequantize(), Q, rtol=1e-6, atol=1e-7)


def test_the_sweep_loses_less_than_rounding_on_a_table() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=g) @ (torch.randn(64, 64, generator=g) / 8 + 0.3 * torch.eye(64))
    weight, H, grid = torch.randn(32, 64, generator=g), x.T @ x / 300, QuantGrid.parse_weights("log4")

    def loss(Q: torch.Tensor) -> float:
        return float((((Q - weight) @ H) * (Q - weight)).sum())

    swept = sweep(weight, factorise(H), None, Round(grid, weight, torch.float32))
    assert loss(swept) < 0.8 * loss(grid.round(weight, grid.fit(weight)))


@pytest.mark.parametrize("word", ["int4-g32", "int3-asym", "fp8", "power4", "codebook3"])
def test_random_rounding_goes_to_a_neighbour_and_is_right_on_average(word: str) -> None:
    grid = QuantGrid.parse_weights(f"{word}-stochastic")
    assert grid.stochastic == 0
    weight = weight_of(4, 32).clamp(-1, 1)
    levels = grid.fit(weight)
    draws = torch.stack([grid.round(weight, levels, torch.Generator().manual_seed(n)) for n in range(600)])
    low, high = draws.amin(0), draws.amax(0)
    tolerance = 1e-6
    inside = (low <= weight + tolerance) & (weight <= high + tolerance)
    noise = (high - low) / 2 / 600**0.5
    assert ((draws.mean(0) - weight).abs() <= 5 * noise + tolerance)[inside].all() and inside.float().mean() > 0.8
    assert ((draws == low) | (draws == high)).all()


def test_random_rounding_is_that_of_its_seed_and_name() -> None:
    weight = weight_of(8, 64)
    grids = [QuantGrid.parse_weights({"bits": 3, "stochastic": seed}) for seed in (0, 0, 1)]
    levels = grids[0].fit(weight)
    one, again, other = (grid.round(weight, levels, grid.generator("layer")) for grid in grids)
    elsewhere = grids[0].round(weight, levels, grids[0].generator("another"))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, elsewhere)
    assert torch.equal(grids[0].round(one, levels), one)  # the nearest, where it already lies


@pytest.mark.parametrize("text", ["power4-mse", "power9", "log4-asym", "codebook1", "power", "log4-token", "fp8-g32",
                                  {"kind": "codebook", "values": [0.5, 1.0]}, {"kind": "codebook", "values": [1, 0]},
                                  {"kind": "log", "values": [0, 1]}, {"bits": 4, "stochastic": True}])  # fmt: skip
def test_tables_that_make_no_grid_are_refused_in_one_line(text: object) -> None:
    with pytest.raises(UserError) as caught:
        QuantGrid.parse_weights(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["power4", "log8-static", "codebook4", "int8-stochastic"])
def test_inputs_are_not_rounded_to_tables_or_at_random(text: str) -> None:
    with pytest.raises(UserError, match="is for weights"):
        QuantGrid.parse_activations(text)


def test_a_given_table_says_how_many_bits_its_codes_take() -> None:
    grid = QuantGrid.parse_weights({"kind": "codebook", "values": [-1, -0.25, 0, 0.25, 1]})
    assert grid.bits == 3 and grid.observer == "mse"
    codes = grid.quantize(weight_of(4, 16), grid.fit(weight_of(4, 16)))
    assert codes.min() >= -4 and codes.max() <= 3
