"""Laws of the grids. The oracle is compressed-tensors' own arithmetic: what a loader of the checkpoint computes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.core.grid import COMPILED_ENTRIES, Levels, QuantGrid, QuantizedWeight, _compiles
from llmcompress.errors import UserError

BITS = range(2, 9)


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g)
    weight[torch.rand(rows, columns, generator=g) < 0.3] = 0
    return weight


def arguments(grid: QuantGrid, strategy: str) -> QuantizationArgs:
    size = grid.group if isinstance(grid.group, int) else None
    return QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy(strategy),
        group_size=size,
        dynamic=grid.dynamic,
    )


def oracle_levels(grid: QuantGrid, args: QuantizationArgs, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """compressed-tensors' scale and zero point of every (row or 1, group)."""
    if grid.group == "tensor":
        low, high = x.amin().view(1), x.amax().view(1)
    else:
        grouped = x.view(x.shape[0], -1, grid.group_size(x.shape[1]))
        low, high = grouped.amin(-1), grouped.amax(-1)
    return calculate_qparams(low, high, args)


@pytest.mark.parametrize("group", ["tensor", "channel", 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rounded_as_compressed_tensors_does(bits: int, symmetric: bool, group: str | int) -> None:
    grid, weight = QuantGrid(bits, symmetric, group), weight_of(12, 48, bits)
    args = arguments(grid, "group" if isinstance(group, int) else group)
    scale, zero = oracle_levels(grid, args, weight)
    levels = grid.fit(weight)
    torch.testing.assert_close(levels.scale.reshape(-1), scale.reshape(-1), rtol=1e-6, atol=0)
    if not symmetric:
        assert torch.equal(levels.zero_point.reshape(-1), zero.reshape(-1).float())
    shape = (1,) if group == "tensor" else levels.scale.shape
    scale = levels.scale.reshape(shape)  # the stored one: equal up to the last bit, which may decide a tie
    zero = zero.reshape(shape)
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)
    assert torch.equal(grid.quantize(weight, levels), codes)
    theirs = dequantize(codes, scale, None if symmetric else zero, args=args)
    assert torch.equal(grid.dequantize(codes, levels), theirs)


@pytest.mark.parametrize("group", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_dynamic_activations_are_rounded_as_compressed_tensors_does(bits: int, symmetric: bool, group: str) -> None:
    grid = QuantGrid(bits, symmetric, group, dynamic=True)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(bits))
    args = arguments(grid, group)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    codes = quantize(x, scale, zero, args, dtype=torch.int8)
    theirs = dequantize(codes, scale, None if symmetric else zero, args=args)
    torch.testing.assert_close(grid.round_activations(x), theirs, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from(["token", 4, 12]),
    columns=st.sampled_from([12, 36, 1020]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1e-42, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_activations_are_rounded_by_the_kernel_to_the_bit_as_by_torch(
    bits: int, group: str | int, columns: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    grid, rows = QuantGrid(bits, True, group, dynamic=True), COMPILED_ENTRIES // columns + 2
    x = (weight_of(rows, columns, seed) * size).to(dtype)
    x[1], x[2, 0] = 0, 1e4 * x[2, 0]
    assert _compiles(x, dtype)
    by_torch = torch.cat([grid.round_activations(part) for part in x.split(4)])
    assert torch.equal(grid.round_activations(x[None])[0], by_torch)


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["fp8", "fp8-tensor", "nvfp4", "mxfp4"]),
    columns=st.sampled_from([32, 96, 1024]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_small_floats_are_the_same_to_the_bit_by_the_kernel_and_by_torch(
    text: str, columns: int, size: float, seed: int
) -> None:
    grid, rows = QuantGrid.parse_weights(text), COMPILED_ENTRIES // columns + 2
    x = weight_of(rows, columns, seed) * size
    x[1], x[2, 0], x[3] = 0, 1e4 * x[2, 0], -0.0
    assert _compiles(x, torch.float32)
    low, high = grid.bounds(x)
    levels = grid.levels(low, high)
    ties = grid.table.middles[-14:] * levels.scale[0, 0]
    x[5, :14], x[6, :14] = ties, -ties  # and beyond the range
    codes, values = grid.quantize(x, levels), grid.dequantize(grid.quantize(x, levels), levels)
    for first in range(0, rows, 4):  # too few for the kernel
        part = slice(first, first + 4)
        own = levels if len(levels.scale) == 1 else Levels(levels.scale[part])
        assert torch.equal(codes[part], grid.quantize(x[part], own))
        by_torch = grid.dequantize(codes[part], own)
        assert torch.equal(values[part].view(torch.int32), by_torch.view(torch.int32))  # the sign of zeros too


@pytest.mark.parametrize("size", [16, 24, 32])
def test_ranges_of_groups_are_the_same_by_the_kernel_and_by_torch(size: int) -> None:
    grid, x = QuantGrid(4, False, size), weight_of(COMPILED_ENTRIES // size, 3 * size)
    x[0], x[1] = x[0].abs(), -x[1].abs()  # zero is in every range
    parts = [grid.bounds(part) for part in x.split(4)]
    for found, by_torch in zip(grid.bounds(x), map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(found, by_torch)


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from(["tensor", "channel", 4, 8]),
    offset=st.sampled_from([0.0, 5.0, -5.0]),
    observer=st.sampled_from(["minmax", "mse"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_zero_is_always_exact_and_codes_stay_in_range(
    bits: int, symmetric: bool, group: str | int, offset: float, observer: str, dtype: torch.dtype, seed: int
) -> None:
    grid, x = QuantGrid(bits, symmetric, group, observer=observer), weight_of(3, 16, seed)
    x = torch.where(x == 0, 0.0, x + offset)
    levels = grid.fit(x, dtype)
    codes = grid.quantize(x, levels)
    low, high = grid.range
    assert codes.dtype == torch.int8 and codes.min() >= low and codes.max() <= high
    assert (grid.dequantize(codes, levels)[x == 0] == 0).all()
    assert torch.equal(levels.scale, levels.scale.to(dtype).float())


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from(["tensor", "channel", 4]),
    seed=st.integers(0, 999),
)
def test_rounding_errs_by_half_a_step_at_most(bits: int, symmetric: bool, group: str | int, seed: int) -> None:
    grid, x = QuantGrid(bits, symmetric, group), weight_of(3, 16, seed)
    levels = grid.fit(x)
    error = (grid.round(x, levels) - x).abs().view(levels.scale.shape[0], levels.scale.shape[1], -1)
    # a zero point is itself rounded, which may cost the far end another half step
    assert (error <= levels.scale[..., None] * ((0.5 if symmetric else 1.0) + 1e-4)).all()


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), group=st.sampled_from(["tensor", "channel", 8]))
def test_rounding_twice_is_rounding_once(bits: int, symmetric: bool, group: str | int) -> None:
    grid, x = QuantGrid(bits, symmetric, group), weight_of(4, 16, bits)
    levels = grid.fit(x)
    once = grid.round(x, levels)
    assert torch.equal(grid.round(once, levels), once)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_never_errs_more_than_the_full_range(bits: int, symmetric: bool) -> None:
    x = weight_of(16, 64, bits)
    full, mse = QuantGrid(bits, symmetric), QuantGrid(bits, symmetric, observer="mse")

    def error(grid: QuantGrid) -> torch.Tensor:
        return (grid.round(x, grid.fit(x)) - x).abs().pow(2.4).sum(1)

    assert (error(mse) <= error(full) * (1 + 1e-5)).all()


def test_all_zero_group_reads_back_as_zero() -> None:
    for grid in (QuantGrid(), QuantGrid(symmetric=False), QuantGrid(4, group=8)):
        x = torch.zeros(2, 16)
        levels = grid.fit(x, torch.bfloat16)
        assert (levels.scale > 0).all() and (grid.round(x, levels) == 0).all()


@pytest.mark.parametrize("text", ["int8", "int8-tensor", "int8-g8", "int8-asym", "int8-tensor-asym"])
def test_no_rows_are_rounded_to_no_rows(text: str) -> None:
    assert QuantGrid.parse_activations(text).round_activations(torch.empty(0, 16)).shape == (0, 16)
    if "tensor" not in text:
        grid = QuantGrid.parse_weights(text)
        assert grid.fit(torch.empty(0, 16)).scale.shape == (0, 16 // grid.group_size(16))


def test_static_activations_use_the_calibrated_levels() -> None:
    grid = QuantGrid(8, group="tensor")
    levels = grid.levels(torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    x = torch.tensor([[0.5, 7.0, -7.0]])
    top, bottom = 127 * 4 / 255, -128 * 4 / 255
    torch.testing.assert_close(
        grid.round_activations(x, levels), torch.tensor([[32 * 4 / 255, top, bottom]]), rtol=1e-6, atol=0
    )


def test_quantized_weight_reads_back() -> None:
    grid, weight = QuantGrid(4, group=8), weight_of(4, 16)
    levels = grid.fit(weight)
    stored = QuantizedWeight(grid.quantize(weight, levels), levels, grid)
    assert torch.equal(stored.dequantize(), grid.round(weight, levels))


def test_bits_per_weight_count_the_scales() -> None:
    assert QuantGrid(4, group=128).bits_per_weight(1024) == 4 + 16 / 128
    assert QuantGrid(4, symmetric=False, group=128).bits_per_weight(1024) == 4 + 20 / 128
    assert QuantGrid(8).bits_per_weight(1024) == 8 + 16 / 1024
    assert QuantGrid(8, group="tensor").bits_per_weight(1024) == 8


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("int8", QuantGrid(8)),
        ("int4-g128", QuantGrid(4, group=128)),
        ("int4-g32-asym", QuantGrid(4, symmetric=False, group=32)),
        ("int3-tensor-mse", QuantGrid(3, group="tensor", observer="mse")),
        ({"bits": 6, "group": "channel", "symmetric": True}, QuantGrid(6)),
    ],
)
def test_weights_are_read_as_written(text: object, grid: QuantGrid) -> None:
    assert QuantGrid.parse_weights(text) == grid


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("int8", QuantGrid(8, group="token", dynamic=True)),
        ("int8-static", QuantGrid(8, group="tensor")),
        ("int8-tensor", QuantGrid(8, group="tensor", dynamic=True)),
        ("int4-g32", QuantGrid(4, group=32, dynamic=True)),
        ({"bits": 8, "dynamic": False}, QuantGrid(8, group="tensor")),
    ],
)
def test_activations_are_read_as_written(text: object, grid: QuantGrid) -> None:
    assert QuantGrid.parse_activations(text) == grid


@pytest.mark.parametrize(
    "text",
    [
        *("int9", "int1", "float8", "int4-g0", "int8-token", "int8-dynamic", "int8-wide"),
        *({"bit": 4}, {"bits": True}, {"group": True}, {"symmetric": 1}, {"observer": "kl"}),
    ],
)
def test_impossible_weight_grid_is_refused_in_one_line(text: object) -> None:
    with pytest.raises(UserError) as caught:
        QuantGrid.parse_weights(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["int8-channel", "int8-token-static", "int8-mse", "int4-g32-static"])
def test_impossible_activation_grid_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        QuantGrid.parse_activations(text)


def test_group_size_that_does_not_divide_names_sizes_that_do() -> None:
    misfit = QuantGrid(4, group=128).misfit(704)
    named = [int(n) for n in misfit.split("one of ")[1].split(", ")]
    assert named and all(704 % n == 0 for n in named)
    assert not QuantGrid(4, group=64).misfit(704)
