"""Training with masks and grids held: a layer computes with its weights under the mask and on the very grid of its
codes, gradients pass through the rounding (see `llmcompress.core.straight_through`), and at the end the codes are those
of the trained weights. Scales stay as they were calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.core.straight_through import round_through
from llmcompress.vision.fold import replace_module
from llmcompress.vision.layers import RoundedConv2d, RoundedLinear, Rounding

_NOTHING = Rounding(None)


class HeldLayer(nn.Module):
    """A Conv2d or Linear that is trained while its mask and its grids are held.

    Args:
        layer: whose weight and bias are trained.
        mask: of the weight's shape, False where it stays zero; None for none.
    """

    def __init__(self, layer: Any, mask: Tensor | None) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask
        self.rounding: Rounding = getattr(layer, "rounding", _NOTHING)

    def weight(self) -> Tensor:
        """As it is multiplied; gradients reach the layer's own."""
        own: Tensor = self.layer.weight
        masked = own if self.mask is None else own * self.mask
        codes = self.rounding.weight
        return masked if codes is None else round_through(codes.grid, masked.flatten(1), codes.levels).view_as(own)

    def forward(self, x: Tensor) -> Tensor:
        """Like the layer's."""
        grid, levels = self.rounding.inputs, self.rounding.levels
        if grid is not None:
            levels = grid.fit(x.detach().flatten(1)) if levels is None else levels
            x = round_through(grid, x, levels)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, self.weight(), self.layer.bias)
        return nn.functional.linear(x, self.weight(), self.layer.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """Gives the layer the weights it was trained with, and the codes that stand for them."""
        if self.mask is not None:
            self.layer.weight.mul_(self.mask)
        weight = self.rounding.weight
        if weight is not None:
            codes = weight.grid.quantize(self.layer.weight.flatten(1), weight.levels)
            self.layer.adopt(replace(self.rounding, weight=replace(weight, codes=codes)))


@contextmanager
def held(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, the network can be trained with masks and grids held; afterwards it is as before, but trained.

    Args:
        module: its layers are changed in place.
        masks: by layer name.
    """
    layers = {
        name: layer for name, layer in module.named_modules()
        if name in masks or isinstance(layer, RoundedConv2d | RoundedLinear)
    }  # fmt: skip
    for name, layer in layers.items():
        replace_module(module, name, HeldLayer(layer, masks.get(name)))
    try:
        yield
    finally:
        for name, layer in layers.items():
            made = module.get_submodule(name)
            assert isinstance(made, HeldLayer)
            made.settle()
            replace_module(module, name, layer)
