"""Rounded layers that hold their codes instead of weights, to be exported: what the codes mean is said by operations of
torch, or by those of ONNX, which torch traces and does not compute."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.core.grid import QuantizedWeight
from llmcompress.vision.fold import replace_module
from llmcompress.vision.layers import RoundedConv2d, RoundedLinear, Rounding

#: the first with INT4 and scales of blocks
OPSET = 21


def with_codes(module: nn.Module, onnx: bool) -> nn.Module:
    """A copy of a network whose rounded layers hold their codes instead of weights.

    Args:
        onnx: operations of ONNX say what they mean, which torch traces and does not compute.
    """
    copied = copy.deepcopy(module)
    rounded = {n: m for n, m in copied.named_modules() if isinstance(m, RoundedConv2d | RoundedLinear)}
    for name, layer in rounded.items():
        kind = _CODED[isinstance(layer, nn.Conv2d), onnx]
        made = kind.__new__(kind)
        made.__dict__.update(layer.__dict__)
        made.hold_codes()
        replace_module(copied, name, made)
    return copied


def stored_type(weight: QuantizedWeight | None, onnx: bool) -> str:
    """What a layer's weights are in a file, in ONNX's words."""
    if weight is None:
        return "FLOAT"
    if not onnx:
        return "INT8"
    if weight.grid.kind == "int":
        return "INT4" if weight.grid.bits <= 4 else "INT8"
    return "FLOAT8E4M3FN" if weight.grid.kind == "fp8" else "FLOAT"


class _Coded(nn.Module):
    """A rounded layer whose weight is made of its codes whenever it is multiplied."""

    rounding: Rounding
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def can_say(weight: QuantizedWeight) -> bool:
        """Whether operations can say what these codes mean."""
        return True

    def hold_codes(self) -> None:
        """Lets go of the weight where codes can stand for it."""
        weight = self.rounding.weight
        if weight is None or not self.can_say(weight):
            return
        self.shape = self._parameters.pop("weight").shape  # type: ignore[union-attr]
        zero = weight.levels.zero_point
        self.register_buffer("codes", weight.codes.contiguous())
        self.register_buffer("scale", weight.levels.scale.contiguous())
        self.register_buffer("zero", None if zero is None else zero.to(torch.int8).contiguous())

    @property
    def weight(self) -> Tensor:
        """What a convolution multiplies by."""
        kept = self._parameters.get("weight")
        return self.values() if kept is None else kept

    def values(self) -> Tensor:
        """Of the codes, in the layer's shape."""
        weight = cast(QuantizedWeight, self.rounding.weight)
        zero = None if self.zero is None else self.zero.float()
        levels = replace(weight.levels, scale=self.scale, zero_point=zero)
        return weight.grid.dequantize(self.codes, levels).view(self.shape)


class _InOnnx(_Coded):
    """The same in operations of ONNX."""

    input_scale: Tensor
    input_zero: Tensor

    @staticmethod
    def can_say(weight: QuantizedWeight) -> bool:
        return stored_type(weight, True) != "FLOAT"

    def hold_codes(self) -> None:
        super().hold_codes()
        grid, levels = self.rounding.inputs, self.rounding.levels
        self.bounds: tuple[float, float] | None = None
        if grid is not None and levels is not None and grid.bits < 8:
            zero = 0.0 if levels.zero_point is None else float(levels.zero_point)
            self.bounds = ((grid.range[0] - zero) * float(levels.scale), (grid.range[1] - zero) * float(levels.scale))
        if "codes" in self._buffers and self.scale.shape[1] == 1:  # so runtimes find a convolution of integers
            self.codes, self.scale = self.codes.view(self.shape), self.scale.flatten()
            self.zero = None if self.zero is None else self.zero.flatten()

    def values(self) -> Tensor:
        parts = [t for t in (self.codes, self.scale, self.zero) if t is not None]
        attributes = {"axis": 0}
        if self.scale.dim() == 2:
            attributes = {"axis": 1, "block_size": self.codes.shape[1] // self.scale.shape[1]}
        return _operation("DequantizeLinear", parts, torch.float32, attributes).view(self.shape)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the weights see it; QuantizeLinear saturates at 8 bits."""
        grid = self.rounding.inputs
        if grid is None or grid.kind != "int" or self.rounding.levels is None:
            return cast(Any, super()).rounded(x)  # type: ignore[no-any-return]
        if self.bounds is not None:
            x = x.clamp(*self.bounds)
        parts = [self.input_scale.view(()), self.input_zero.view(()).to(torch.int8)]
        codes = _operation("QuantizeLinear", [x, *parts], torch.int8)
        return _operation("DequantizeLinear", [codes, *parts], torch.float32)


class _CodedConv2d(_Coded, RoundedConv2d):  # type: ignore[override]
    pass


class _CodedLinear(_Coded, RoundedLinear):  # type: ignore[override]
    pass


class _OnnxConv2d(_InOnnx, RoundedConv2d):  # type: ignore[override]
    pass


class _OnnxLinear(_InOnnx, RoundedLinear):  # type: ignore[override]
    pass


#: (is a convolution, in operations of ONNX) → the layer
_CODED: dict[tuple[bool, bool], type[_Coded]] = {
    (True, False): _CodedConv2d, (False, False): _CodedLinear, (True, True): _OnnxConv2d, (False, True): _OnnxLinear,
}  # fmt: skip


def _operation(name: str, parts: list[Tensor], dtype: torch.dtype, attributes: dict[str, Any] | None = None) -> Tensor:
    """One of ONNX, of the first part's shape."""
    return torch.onnx.ops.symbolic(name, parts, attributes or {}, dtype=dtype, shape=parts[0].shape, version=OPSET)
