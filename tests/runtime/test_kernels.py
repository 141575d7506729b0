"""The integer kernels compute what simulating the same grids in floating point gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.export.quantized import Scheme, pack
from llmcompress.runtime.choose import choose, why_not_int4, why_not_int8
from llmcompress.runtime.cuda import Float8CudaLinear, Int8CudaLinear
from llmcompress.runtime.int4 import TILE_TOKENS, W4A16Linear, layout_is_known
from llmcompress.runtime.int8 import W8A8Linear
from llmcompress.runtime.rows import SHARED_ENTRIES, ZERO_POINT, row_codes, scaled_rows

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
INT8 = {
    "w8a8": Scheme(W("int8"), A("int8")),
    "w8a8-tensor": Scheme(W("int8-tensor"), A("int8-tensor")),
    "w8a8-static": Scheme(W("int8"), A("int8-static")),
    "w8a8-static-asym": Scheme(W("int8"), A("int8-static-asym")),
    "w8a8-asym-inputs": Scheme(W("int8"), A("int8-asym")),
    "w6a6": Scheme(W("int6"), A("int6")),
    "w4a8": Scheme(W("int4"), A("int8")),
    "outputs": Scheme(W("int8"), A("int8"), A("int8")),
}
INT4 = {
    "w4a16-g128": Scheme(W("int4-g128")),
    "w4a16-g32": Scheme(W("int4-g32")),
    "w4a16-channel": Scheme(W("int4")),
    "w4a16-tensor": Scheme(W("int4-tensor")),
    "w4a16-g32-asym": Scheme(W("int4-g32-asym")),
    "w3a16-g64": Scheme(W("int3-g64")),
}


def stored(
    scheme: Scheme, dtype: torch.dtype, rows: int = 192, columns: int = 256
) -> tuple[dict[str, Tensor], Tensor, Levels | None]:
    """Tensors as a checkpoint holds them, the float32 weight they stand for, and levels of a static input grid."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    levels = scheme.weights.fit(weight, dtype)
    quantized = QuantizedWeight(scheme.weights.quantize(weight, levels), levels, scheme.weights)
    static = None
    if scheme.activations is not None and not scheme.activations.dynamic:
        static = Levels(torch.tensor([[3 / 128]]))
        if not scheme.activations.symmetric:
            static = Levels(static.scale, torch.tensor([[-17.0]]))
    return pack(quantized, scheme, dtype, static), quantized.dequantize(), static


def simulated(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme, static: Levels | None) -> Tensor:
    inputs = x if scheme.activations is None else scheme.activations.round_activations(x, static)
    y = inputs.float() @ weight.T + (0 if bias is None else bias.float())
    return y if scheme.outputs is None else scheme.outputs.round_activations(y)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("module", [W8A8Linear, Int8CudaLinear])
def test_integer_products_are_the_simulated_ones(name: str, module: type[nn.Module]) -> None:
    scheme = INT8[name]
    assert why_not_int8(scheme) == ""
    tensors, weight, static = stored(scheme, torch.float32)
    bias = nn.Parameter(torch.randn(192))
    given = (tensors, scheme, bias, "cpu") if module is Int8CudaLinear else (tensors, scheme, bias)
    linear = module(*given)
    for shape in ((1, 256), (3, 7, 256), (600, 256)):
        x = torch.randn(shape)
        y = linear(x)
        assert y.shape == (*shape[:-1], 192) and y.dtype == x.dtype
        # Rounded outputs may differ by a step where a sum lies on a boundary.
        assert distance(y, simulated(x, weight, bias, scheme, static)) < (1e-3 if scheme.outputs else 1e-5)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "w8a8-asym-inputs", "w6a6"])
def test_integer_products_in_bfloat16_differ_by_its_rounding(name: str) -> None:
    tensors, weight, static = stored(INT8[name], torch.bfloat16)
    linear = W8A8Linear(tensors, INT8[name], None)
    x = torch.randn(5, 256).to(torch.bfloat16)
    levels = static or INT8[name].activations.fit(x, torch.bfloat16)
    exact = INT8[name].activations.round(x, levels) @ weight.T
    assert distance(linear(x), exact) < 2**-8


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("tokens", [1, 5, TILE_TOKENS, TILE_TOKENS + 77])
def test_packed_products_are_the_simulated_ones(name: str, tokens: int) -> None:
    scheme = INT4[name]
    assert why_not_int4(scheme, 192, 256) == ""
    tensors, weight, _ = stored(scheme, torch.bfloat16)
    bias = nn.Parameter(torch.randn(192).to(torch.bfloat16))
    x = torch.randn(tokens, 256).to(torch.bfloat16)
    assert distance(W4A16Linear(tensors, scheme, bias)(x), simulated(x, weight, bias, scheme, None)) < 2**-7
    assert W4A16Linear(tensors, scheme, None)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("rows", [16, 48, 80])
def test_rows_that_fill_no_block_are_multiplied_too(rows: int) -> None:
    tensors, weight, _ = stored(INT4["w4a16-g32"], torch.bfloat16, rows)
    linear = W4A16Linear(tensors, INT4["w4a16-g32"], None)
    for tokens in (1, 2 * TILE_TOKENS):
        x = torch.randn(tokens, 256).to(torch.bfloat16)
        assert distance(linear(x), x.float() @ weight.T) < 2**-7


def test_both_ways_through_packed_weights_agree() -> None:
    tensors, _, _ = stored(INT4["w4a16-g128"], torch.bfloat16)
    linear = W4A16Linear(tensors, INT4["w4a16-g128"], None)
    if not layout_is_known():
        pytest.skip("torch packs otherwise here")
    x = torch.randn(TILE_TOKENS, 256).to(torch.bfloat16)
    tiled, linear.tiled = linear(x), False
    assert distance(tiled, linear(x).float()) < 2**-7


def test_packed_weights_take_half_a_byte_each() -> None:
    tensors, _, _ = stored(INT4["w4a16-g128"], torch.bfloat16)
    assert W4A16Linear(tensors, INT4["w4a16-g128"], None).packed.nbytes == 192 * 256 // 2


@pytest.mark.parametrize("inputs", ["fp8", "fp8-static"])
def test_float8_products_are_the_simulated_ones(inputs: str) -> None:
    scheme = Scheme(W("fp8"), A(inputs))
    assert choose(scheme, 192, 256, "auto", "cuda")[0] == "fp8" and choose(scheme, 192, 256, "auto")[0] == "dense"
    tensors, weight, static = stored(scheme, torch.float32)
    bias = nn.Parameter(torch.randn(192))
    x = torch.randn(3, 5, 256)
    found = Float8CudaLinear(tensors, scheme, bias, "cpu")(x)
    assert distance(found, simulated(x, weight, bias, scheme, static)) < 2**-8  # sums come in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_row_codes_are_those_of_the_grid(dtype: torch.dtype, bits: int) -> None:
    grid = QuantGrid(bits, group="token", dynamic=True)
    for rows in (1, SHARED_ENTRIES // 256 + 3):
        x = torch.randn(rows, 256).to(dtype)
        x[0, :3] = torch.tensor([4.0, -4.0, 0.5])
        x[-1] = 0
        levels = grid.fit(x, dtype)
        codes, scales = row_codes(x, bits)
        assert torch.equal(scales, levels.scale)
        assert torch.equal(codes.int() - ZERO_POINT, grid.quantize(x, levels).int())


def test_scaled_rows_round_as_torch_does() -> None:
    sums, scales = torch.randn(40, 300), torch.rand(40, 1)
    assert torch.equal(scaled_rows(sums.clone(), scales, torch.bfloat16), (sums * scales).to(torch.bfloat16))
    assert torch.equal(scaled_rows(sums.clone(), scales, torch.float32), sums * scales)


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (Scheme(W("int8-asym"), A("int8")), "asymmetric"),
        (Scheme(W("int8-g32"), A("int8")), "along a row"),
        (Scheme(W("int8")), "8 bits"),
        (Scheme(W("int4-g16")), "group"),
        (Scheme(W("int4-g32"), A("int8")), "along a row"),
    ],
)
def test_what_no_kernel_executes_is_dense_for_a_reason(scheme: Scheme, why: str) -> None:
    kernel, reason = choose(scheme, 64, 256, "auto")
    assert kernel == "dense" and why in reason


def test_a_kernel_asked_for_is_the_only_one_taken() -> None:
    assert choose(INT8["w8a8"], 64, 256, "auto")[0] == choose(INT8["w8a8"], 64, 256, "int8")[0] == "int8"
    assert choose(INT4["w4a16-g128"], 64, 256, "auto")[0] == "int4"
    assert choose(INT8["w8a8"], 64, 256, "int4")[0] == choose(INT8["w8a8"], 64, 256, "dense")[0] == "dense"
