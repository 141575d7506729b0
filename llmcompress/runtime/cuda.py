"""On a CUDA device: W8A8 by ``torch._int_mm``, int8 codes on both sides, int32 sums, scaled afterwards; FP8 by
``torch._scaled_mm``, which scales rows and columns itself.

Written after torch's documentation and checked on the CPU, where the same operators exist; not run on a GPU so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.core.floats import E4M3
from llmcompress.core.grid import Levels
from llmcompress.export.quantized import Scheme, unpack, unpack_activations

#: ``_int_mm`` refuses fewer rows on CUDA: they are filled up with zeros
LEAST_ROWS = 32


class Int8CudaLinear(nn.Module):
    """A Linear whose weight is held as int8 codes.

    Args:
        tensors: of the stored Linear, by name within it.
        scheme: for which `why_not_int8` is silent.
        bias: (out,), or None.
        device: where it runs.
    """

    codes: Tensor
    weight_scale: Tensor
    row_sums: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, bias: nn.Parameter | None, device: str = "cuda"
    ) -> None:
        super().__init__()
        stored = unpack(tensors, scheme)
        self.out_features, self.in_features = stored.codes.shape
        self.scheme, self.bias = scheme, bias
        scale = stored.levels.scale.expand(self.out_features, 1).flatten()
        self.register_buffer("codes", stored.codes.to(device).T, persistent=False)  # (in, out), columns contiguous
        self.register_buffer("weight_scale", scale.to(device), persistent=False)
        sums = stored.codes.sum(1, dtype=torch.int32).float() * scale
        self.register_buffer("row_sums", sums.to(device), persistent=False)
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
        codes = grid.quantize(rows, levels)
        missing = max(0, LEAST_ROWS - len(rows))
        sums = torch._int_mm(F.pad(codes, (0, 0, 0, missing)), self.codes)[: len(rows)]
        y = sums.float() * self.weight_scale
        if levels.zero_point is not None:
            y -= levels.zero_point * self.row_sums
        y = (y * levels.scale).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.scheme.outputs is None else self.scheme.outputs.round_activations(y)


class Float8CudaLinear(nn.Module):
    """A Linear whose weight is held as e4m3.

    Args:
        tensors: of the stored Linear, by name within it.
        scheme: fp8 weights per channel or tensor, fp8 inputs.
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
        scale = stored.levels.scale.expand(self.out_features, 1).T.contiguous()
        self.register_buffer("codes", stored.codes.view(E4M3).to(device).T, persistent=False)
        self.register_buffer("weight_scale", scale.to(device), persistent=False)  # (1, out)
        found = unpack_activations(tensors)
        self.input_levels = None if found is None else Levels(found.scale.to(device))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) floating → (…, out) of the same dtype."""
        grid = self.scheme.activations
        assert grid is not None
        rows = x.reshape(-1, self.in_features)
        levels = self.input_levels or grid.fit(rows, rows.dtype)
        codes = grid.quantize(rows, levels).view(E4M3)
        scales = levels.scale.expand(len(rows), 1).contiguous()
        y = torch._scaled_mm(codes, self.codes, scale_a=scales, scale_b=self.weight_scale, out_dtype=torch.bfloat16)
        y = y.to(x.dtype)
        if self.bias is not None:
            y += self.bias
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.scheme.outputs is None else self.scheme.outputs.round_activations(y)
