"""Convolutions and Linears whose weights are codes and whose inputs are rounded, as plain modules: they load, train,
export and trace like any other. They compute in float32 what `llmcompress.vision.int8` computes in integers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.core.floats import E4M3, E4M3_MOST
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.errors import UserError


@dataclass
class Rounding:
    """How one layer is rounded.

    Attributes:
        weight: codes (out, in), the groups of a convolution below each other, scales (out, G); None leaves the weights
            in floating point.
        inputs: grid of the input; None leaves it in floating point.
        levels: (1, 1) of a static grid.
    """

    weight: QuantizedWeight | None
    inputs: QuantGrid | None = None
    levels: Levels | None = None


def joined(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """The matrices of one module below each other; a scale per tensor becomes one per row."""
    grid = parts[0].grid
    rows = [len(part.codes) for part in parts]
    scale = torch.cat([p.levels.scale.expand(n, -1) for p, n in zip(parts, rows, strict=True)])
    zeros = [p.levels.zero_point for p in parts]
    zero = None
    if all(z is not None for z in zeros):
        zero = torch.cat([z.expand(n, -1) for z, n in zip(zeros, rows, strict=True)])  # type: ignore[union-attr]
    grid = replace(grid, group="channel") if grid.group == "tensor" else grid
    return QuantizedWeight(torch.cat([p.codes for p in parts]), Levels(scale, zero), grid)


def round_inputs(x: Tensor, grid: QuantGrid, levels: Levels | None) -> Tensor:
    """``x`` of any shape on a grid per tensor, by operations that trace where its levels are given."""
    if levels is None:
        return grid.round_activations(x)
    if grid.kind == "fp8":
        return (x / levels.scale.view(())).clamp(-E4M3_MOST, E4M3_MOST).to(E4M3).to(x.dtype) * levels.scale.view(())
    scale, zero = levels.scale.view(()), 0.0 if levels.zero_point is None else levels.zero_point.view(())
    return (torch.clamp(torch.round(x / scale + zero), *grid.range) - zero) * scale


class _Rounded(nn.Module):
    """What both kinds share. ``weight`` holds the values of the codes."""

    rounding: Rounding
    input_scale: Tensor
    input_zero: Tensor

    def adopt(self, rounding: Rounding) -> None:
        """Takes the codes' values as weight, and keeps the input's grid."""
        self.rounding = rounding
        if rounding.weight is not None:
            weight = self.get_parameter("weight")
            weight.data.copy_(rounding.weight.dequantize().view_as(weight))
        if rounding.levels is not None:
            zero = rounding.levels.zero_point
            self.register_buffer("input_scale", rounding.levels.scale.clone(), persistent=False)
            self.register_buffer("input_zero", torch.zeros(1, 1) if zero is None else zero.clone(), persistent=False)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the weights see it."""
        grid, levels = self.rounding.inputs, self.rounding.levels
        if grid is None:
            return x
        if levels is not None:  # buffers, so that they follow the module to another device
            levels = Levels(self.input_scale, None if levels.zero_point is None else self.input_zero)
        return round_inputs(x, grid, levels)


class RoundedConv2d(_Rounded, nn.Conv2d):
    """A convolution of rounded weights on rounded inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return nn.Conv2d.forward(self, self.rounded(x))


class RoundedLinear(_Rounded, nn.Linear):
    """A Linear of rounded weights on rounded inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return nn.Linear.forward(self, self.rounded(x))


def round_layer(layer: nn.Module, rounding: Rounding) -> nn.Module:
    """A rounded layer with the shape and bias of ``layer``, whose parameters it takes over.

    Raises:
        UserError: the layer is no Conv2d or Linear.
    """
    made: Any
    if isinstance(layer, nn.Conv2d):
        made = RoundedConv2d.__new__(RoundedConv2d)
    elif isinstance(layer, nn.Linear):
        made = RoundedLinear.__new__(RoundedLinear)
    else:
        raise UserError("only Conv2d and Linear can be rounded", type(layer).__name__, "exclude it")
    made.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    made.adopt(rounding)
    return made  # type: ignore[no-any-return]
