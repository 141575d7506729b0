"""W8A8 on a CPU: weights stay int8, inputs become 8-bit codes per token, oneDNN multiplies integers.

    y_to = s_t · Σ_i (u_ti − 128) q_oi · s_o  − s_t z_t · Σ_i q_oi · s_o  + b_o

u are the unsigned codes of the input, z its zero point (symmetric inputs have none). The sums are exact integers, so
the result is what simulating the same grids in floating point gives, up to float rounding. Codes of fewer than 8 bits
multiply in the same way: W4A8 and W6A6 run here too, in a byte per weight.

One kernel serves every number of tokens: oneDNN's is the fastest of torch's at 1 token as at 512."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmcompress.core.grid import Levels, QuantGrid
from llmcompress.export.quantized import Scheme, unpack, unpack_activations
from llmcompress.runtime.rows import ZERO_POINT, row_codes, scaled_rows


class W8A8Linear(nn.Module):
    """A Linear whose weight is held as int8 codes in oneDNN's layout.

    The packed weight is no tensor that could be saved or moved: `load` makes the module where it runs.

    Args:
        tensors: of the stored Linear, by name within it (``weight``, ``weight_scale``, ``input_scale`` …).
        scheme: for which `choose.why_not_int8` is silent.
        bias: (out,), or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Scheme, bias: nn.Parameter | None) -> None:
        super().__init__()
        assert scheme.activations is not None
        stored, grid = unpack(tensors, scheme), scheme.activations
        self.out_features, self.in_features = stored.codes.shape
        self.scheme, self.bias = scheme, bias
        self.input_levels: Levels | None = unpack_activations(tensors)
        self.fused = grid.symmetric and grid.dynamic and grid.group == "token"
        # Plain attributes, not buffers: in decoding, looking those up is a good part of what surrounds a product.
        self.weight_scale = stored.levels.scale.expand(self.out_features, 1).flatten().contiguous()
        self.zero_points = torch.zeros(1, dtype=torch.int64)  # one of all rows: the kernel takes symmetric weights only
        self.row_sums: Tensor | None = None
        if not grid.symmetric:
            self.row_sums = stored.codes.sum(1, dtype=torch.int32).float().mul_(self.weight_scale)
        self.packed = torch.ops.onednn.qlinear_prepack(stored.codes, None)
        self._product = torch.ops.onednn.qlinear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) floating → (…, out) of the same dtype. No gradient passes."""
        rows = x.detach().reshape(-1, self.in_features)
        codes, scales, zeros = self._input_codes(rows)
        if len(rows) == 1 and zeros is None:  # one scale: the kernel multiplies by it, and rounds
            y = self._multiply(codes, float(scales), x.dtype if x.dtype == torch.bfloat16 else torch.float32).to(
                x.dtype
            )
        else:
            sums = self._multiply(codes, 1.0, torch.float32)
            if zeros is not None and self.row_sums is not None:
                sums.addr_(zeros.flatten(), self.row_sums, alpha=-1)
            y = scaled_rows(sums, scales, x.dtype)
        if self.bias is not None:
            y += self.bias.detach()
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.scheme.outputs is None else self.scheme.outputs.round_activations(y)

    def _multiply(self, codes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """(T, out) in ``dtype``: sums over unsigned codes less ZERO_POINT, times ``scale`` and the weights' scales."""
        return self._product(
            codes, scale, ZERO_POINT, self.packed, self.weight_scale, self.zero_points, None,
            1.0, 0, dtype, "none", [], "",
        )  # fmt: skip

    def _input_codes(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unsigned codes (T, in), scales (T, 1) and, of asymmetric grids, zero points (T, 1)."""
        grid = self.scheme.activations
        assert grid is not None
        if self.fused and rows.dtype in (torch.bfloat16, torch.float32):
            codes, scales = row_codes(rows.contiguous(), grid.bits)
            return codes, scales, None
        return _codes_on(grid, rows, self.input_levels)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _codes_on(grid: QuantGrid, rows: Tensor, levels: Levels | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for any grid, by its own arithmetic."""
    levels = levels or grid.fit(rows, rows.dtype)
    codes = grid.quantize(rows, levels).to(torch.int16).add_(ZERO_POINT).to(torch.uint8)
    scales = levels.scale.expand(len(rows), 1).contiguous()
    zeros = None if levels.zero_point is None else levels.zero_point.expand(len(rows), 1)
    return codes, scales, zeros
