"""On a CUDA device: W8A8 by ``torch._int_mm``, int8 codes on both sides, int32 sums, scaled afterwards; FP8 by
``torch._scaled_mm``, which scales rows and columns itself. torch has both products, so nothing here needs Triton.

Written after torch's documentation and checked on the CPU, where the same operators exist; not run on a GPU so far."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.core.floats import E4M3
from llmcompress.core.grid import Levels
from llmcompress.export.quantized import Scheme, unpack, unpack_activations

#: ``_int_mm`` refuses fewer rows on CUDA: they are filled up with zeros
LEAST_ROWS = 32


class _CudaLinear(nn.Module):
    """A Linear whose weight is held as codes of one byte.

    Args:
        tensors: of the stored Linear, by name within it.
        scheme: whose inputs are rounded.
        bias: (out,), or None.
        device: where it runs.
    """

    codes: Tensor
    weight_scale: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, bias: nn.Parameter | None, device: str = "cuda"
    ) -> None:
        super().__init__()
        stored = unpack(tensors, scheme)
        self.out_features, self.in_features = stored.codes.shape
        self.scheme, self.bias = scheme, bias
        self.register_buffer("codes", self._held(stored.codes).to(device).T, persistent=False)  # columns contiguous
        scale = stored.levels.scale.expand(self.out_features, 1).T.contiguous()
        self.register_buffer("weight_scale", scale.to(device), persistent=False)  # (1, out)
        found = unpack_activations(tensors)
        zero = None if found is None or found.zero_point is None else found.zero_point.to(device)
        self.input_levels = None if found is None else Levels(found.scale.to(device), zero)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) floating → (…, out) of the same dtype."""
        grid = self.scheme.activations
        assert grid is not None
        rows = x.reshape(-1, self.in_features)
        levels = self.input_levels or grid.fit(rows, rows.dtype)
        y = self._product(grid.quantize(rows, levels), levels).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.scheme.outputs is None else self.scheme.outputs.round_activations(y)

    def _held(self, codes: Tensor) -> Tensor:
        """The stored codes, int8, in the dtype that is multiplied."""
        return codes

    def _product(self, codes: Tensor, levels: Levels) -> Tensor:
        """Codes of the input (T, in) int8 → (T, out), scaled on both sides."""
        raise NotImplementedError


class Int8CudaLinear(_CudaLinear):
    """Both sides int8, for schemes of which `choose.why_not_int8` is silent."""

    def _product(self, codes: Tensor, levels: Levels) -> Tensor:
        missing = max(0, LEAST_ROWS - len(codes))
        sums = torch._int_mm(F.pad(codes, (0, 0, 0, missing)), self.codes)[: len(codes)]
        y = sums.float() * self.weight_scale
        if levels.zero_point is not None:
            y -= levels.zero_point * self.row_sums
        return y * levels.scale

    @cached_property
    def row_sums(self) -> Tensor:
        """(1, out): what an input of ones gives."""
        return self.codes.sum(0, dtype=torch.int32).float() * self.weight_scale


class Float8CudaLinear(_CudaLinear):
    """Both sides e4m3: weights per channel or tensor, inputs per token or tensor. Sums come in bfloat16."""

    def _held(self, codes: Tensor) -> Tensor:
        return codes.view(E4M3)

    def _product(self, codes: Tensor, levels: Levels) -> Tensor:
        scales = levels.scale.expand(len(codes), 1).contiguous()
        return torch._scaled_mm(
            codes.view(E4M3), self.codes, scale_a=scales, scale_b=self.weight_scale, out_dtype=torch.bfloat16
        )
