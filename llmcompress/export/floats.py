"""Matrices of small floating-point numbers as compressed-tensors stores them.

| kind    | tensors of a Linear (O, I)                                                                                |
|---------|-----------------------------------------------------------------------------------------------------------|
| `fp8`   | `weight` e4m3 (O, I); `weight_scale` (O, 1), or (1,) per tensor, in the model's dtype                      |
| `nvfp4` | `weight_packed` uint8 (O, I/2); `weight_scale` e4m3 (O, I/16); `weight_global_scale` float32 (1,)          |
| `mxfp4` | `weight_packed` uint8 (O, I/2); `weight_scale` uint8 (O, I/32), exponents with bias 127                    |

The first of two packed codes is in the low half of its byte. nvfp4's stored scales are divided by the global one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from llmcompress.core.floats import E4M3, FLOATS
from llmcompress.core.grid import Levels, QuantGrid
from llmcompress.errors import UserError

_EXPONENT_BIAS = 127
#: kind → dtype of the stored scales, where it is not the model's
_SCALE_DTYPES = {"nvfp4": E4M3, "mxfp4": torch.uint8}


def unloadable(grid: QuantGrid, dtype: torch.dtype) -> str:
    """Why loaders could not run a model of this dtype with weights on this grid; empty if they can."""
    if grid.kind in _SCALE_DTYPES and dtype != torch.bfloat16:
        return f"compressed-tensors widens {grid.kind} weights to bfloat16, which a model of {dtype} cannot multiply"
    return ""


def pack_floats(kind: str, codes: Tensor, levels: Levels, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one Linear by their name within it.

    Args:
        kind: key of FLOATS.
        codes: (out, in) int8 of `float_codes`.
        levels: of the grid.
        dtype: of the model.

    Raises:
        ValueError: scales would not read back as given.
    """
    if kind == "fp8":
        scale = levels.scale.to(dtype)
        if not torch.equal(scale.float(), levels.scale):
            raise ValueError(f"weight scales are not exact in {dtype}: fit the grid with scale_dtype={dtype}")
        return {"weight": codes.view(E4M3), "weight_scale": scale.flatten() if len(scale) == 1 < len(codes) else scale}
    halves = codes.view(torch.uint8)
    tensors = {"weight_packed": halves[:, ::2] | (halves[:, 1::2] << 4)}
    if kind == "mxfp4":
        exponents = torch.log2(levels.scale).round().to(torch.int32) + _EXPONENT_BIAS
        return tensors | {"weight_scale": exponents.to(torch.uint8)}
    assert levels.outer is not None
    scale = (levels.scale * levels.outer).to(E4M3)
    return tensors | {"weight_scale": scale, "weight_global_scale": levels.outer.reshape(1)}


def unpack_floats(kind: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Levels]:
    """The inverse of ``pack_floats``: codes (out, in) int8 and float32 levels."""
    scale = tensors["weight_scale"]
    if kind == "fp8":
        return tensors["weight"].view(torch.int8), Levels(scale.float().reshape(-1, 1))
    packed = tensors["weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).view(torch.int8)
    if kind == "mxfp4":
        return codes, Levels(torch.exp2(scale.float() - _EXPONENT_BIAS))
    outer = tensors["weight_global_scale"].float().reshape(())
    return codes, Levels(scale.float() / outer, None, outer)


def float_args(grid: QuantGrid) -> QuantizationArgs:
    """A float grid in the library's words."""
    size, scale_dtype = FLOATS[grid.kind][1], _SCALE_DTYPES.get(grid.kind)
    strategy = QuantizationStrategy.TENSOR_GROUP if grid.kind == "nvfp4" else QuantizationStrategy.GROUP
    return QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType.FLOAT,
        symmetric=True,
        strategy=strategy if size else QuantizationStrategy(grid.group),
        group_size=size or None,
        dynamic=grid.dynamic,
        scale_dtype=scale_dtype,
        zp_dtype=scale_dtype,
    )


def float_grid(args: QuantizationArgs) -> QuantGrid:
    """The inverse of ``float_args``.

    Raises:
        UserError: other floats, or other groups of them.
    """
    size = args.group_size or 0
    kind = next((kind for kind, shape in FLOATS.items() if shape == (args.num_bits, size)), "")
    if not kind or not args.symmetric or (not size and args.strategy not in ("tensor", "channel", "token")):
        raise UserError(
            f"{args.num_bits}-bit floats per {args.strategy} are not read",
            "quantization_config",
            f"use {', '.join(FLOATS)}",
        )
    group = size or QuantizationStrategy(args.strategy).value
    return QuantGrid(args.num_bits, True, group, bool(args.dynamic), kind=kind)
