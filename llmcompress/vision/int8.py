"""Convolutions in integers on a CPU: the codes of a rounded layer, multiplied by oneDNN.

Inputs go in as uint8, codes plus 128: with int8 inputs oneDNN falls back to a reference kernel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision.fold import replace_module
from llmcompress.vision.layers import RoundedConv2d

#: signed codes to unsigned ones
OFFSET = 128


def misfit(layer: RoundedConv2d) -> str:
    """Why a layer cannot run in integers; empty if it can."""
    weight, inputs = layer.rounding.weight, layer.rounding.inputs
    if weight is None or weight.grid.kind != "int" or not weight.grid.symmetric or weight.levels.scale.shape[1] != 1:
        return "its weights are not symmetric integers with a scale per channel"
    if inputs is None or inputs.kind != "int" or layer.rounding.levels is None or inputs.bits != 8:
        return "its inputs are not int8 with a static scale"
    return (
        "it pads in another way than with zeros"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        else ""
    )


class Int8Conv2d(nn.Module):
    """A rounded convolution that multiplies integers.

    Args:
        layer: of which `misfit` has nothing to say.
    """

    def __init__(self, layer: RoundedConv2d) -> None:
        super().__init__()
        weight, levels = layer.rounding.weight, layer.rounding.levels
        assert weight is not None and levels is not None
        self.scale = float(levels.scale)
        self.zero = OFFSET + (0 if levels.zero_point is None else int(levels.zero_point))
        self.geometry: list[Any] = [
            list(layer.stride),
            list(cast(Any, layer.padding)),
            list(layer.dilation),
            layer.groups,
        ]
        self.weight_scale, self.bias = weight.levels.scale.flatten().contiguous(), layer.bias
        self.weight_zero = torch.zeros(len(self.weight_scale), dtype=torch.int32)
        codes = weight.codes.view(layer.weight.shape).contiguous()
        self.packed = torch.ops.onednn.qconv_prepack(
            codes, self.weight_scale, self.scale, self.zero, *self.geometry, None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32 to (N, C', H', W') float32."""
        codes = x.div(self.scale).add_(self.zero).round_().clamp_(0, 255).to(torch.uint8)
        return torch.ops.onednn.qconv_pointwise(
            codes, self.scale, self.zero, self.packed, self.weight_scale, self.weight_zero, self.bias, *self.geometry,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def to_int8(module: nn.Module) -> nn.Module:
    """Puts integer convolutions where rounded ones are and can run so, in place; the others stay.

    Raises:
        UserError: none can.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, RoundedConv2d)}
    fits = {name: layer for name, layer in found.items() if not misfit(layer)}
    if not fits:
        reason = misfit(next(iter(found.values()))) if found else "no convolution is rounded"
        raise UserError(f"cannot run in integers: {reason}", type(module).__name__, "use the recipe int8")
    for name, layer in fits.items():
        replace_module(module, name, Int8Conv2d(layer))
    return module
