"""W4A16 on a CPU: weights stay packed 4-bit codes; inputs and sums are floating point.

Two ways through one packed tensor. Few tokens, as in decoding, go through torch's int4 kernel, which reads a quarter of
what bfloat16 weights would be. From `TILE_TOKENS` on that kernel is slower than a bfloat16 product; then a tile of the
weight at a time is widened to bfloat16 (a few MiB, never the matrix) and multiplied as such.

Codes of 2 to 4 bits, symmetric or not, fit: w = (q − z) · s. Both ways compute in bfloat16, whatever the model's dtype
(the kernel is twelve times slower on float32 inputs): scales and inputs are rounded to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from llmcompress.core.grid import Levels
from llmcompress.export.quantized import Scheme, unpack
from llmcompress.runtime.tiles import BLOCK, widen

#: tokens from which widening tiles is faster than the int4 kernel
TILE_TOKENS = 56
#: weights widened at once
TILE_ENTRIES = 1 << 22
#: group sizes of torch's kernel
GROUPS = (32, 64, 128, 256)
#: rows that are packed at once: torch packs from int32
_PACKED_ROWS = 1024


class W4A16Linear(nn.Module):
    """A Linear whose weight is held as two 4-bit codes a byte, in the layout of torch's kernel.

    Args:
        tensors: of the stored Linear, by name within it.
        scheme: for which `choose.why_not_int4` is silent.
        bias: (out,), or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Scheme, bias: nn.Parameter | None) -> None:
        super().__init__()
        stored = unpack(tensors, scheme)
        self.out_features, self.in_features = stored.codes.shape
        self.scheme, self.bias = scheme, bias
        self.group = kernel_group(scheme, self.in_features)
        # Plain attributes, not buffers: in decoding, looking those up is a good part of what surrounds a product.
        self.packed = torch.cat([_packed(part) for part in stored.codes.split(_PACKED_ROWS)])
        self.levels = _kernel_levels(stored.levels, self.out_features, self.in_features // self.group)
        self._product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.tiled = self.out_features % BLOCK == 0 and layout_is_known()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) floating → (…, out) of the same dtype. No gradient passes."""
        rows = x.detach().reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if self.tiled and len(rows) >= TILE_TOKENS:
            y = self._by_tiles(rows)
        else:
            y = self._product(rows, self.packed, self.group, self.levels)
        y = y.to(x.dtype)
        if self.bias is not None:
            y += self.bias.detach()
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.scheme.outputs is None else self.scheme.outputs.round_activations(y)

    def _by_tiles(self, rows: Tensor) -> Tensor:
        """(T, out) bfloat16."""
        step = max(TILE_ENTRIES // self.in_features // BLOCK, 1) * BLOCK
        y = torch.empty(len(rows), self.out_features, dtype=torch.bfloat16)
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            y[:, first:last] = rows @ widen(self.packed[first:last], self.levels[:, first:last], self.group)
        return y

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@cache
def layout_is_known() -> bool:
    """Whether torch packs 4-bit codes on this processor as `widen` reads them (it does with AVX-512)."""
    codes = torch.arange(2 * BLOCK * 32, dtype=torch.int32).mul_(7).remainder_(13).view(2 * BLOCK, 32)
    levels = torch.stack([torch.ones(1, 2 * BLOCK), torch.zeros(1, 2 * BLOCK)], -1).to(torch.bfloat16)
    return torch.equal(widen(_packed(codes - 8), levels, 32), (codes - 8).T.to(torch.bfloat16))


def _packed(codes: Tensor) -> Tensor:
    """(rows, columns) codes in [-8, 7] → (rows, columns / 2) uint8 as the kernel reads them."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).add_(8), 1)


def kernel_group(scheme: Scheme, columns: int) -> int:
    """The largest of the kernel's groups within which a scale does not change; 0 if there is none."""
    own = scheme.weights.group_size(columns)
    return next((size for size in reversed(GROUPS) if own % size == 0), 0)


def _kernel_levels(levels: Levels, rows: int, groups: int) -> Tensor:
    """(groups, rows, 2) bfloat16: scale s and offset −z·s, repeated where the kernel's groups are smaller."""
    zero = torch.zeros_like(levels.scale) if levels.zero_point is None else levels.zero_point
    both = torch.stack([levels.scale, -zero * levels.scale], -1).expand(rows, -1, 2)
    return both.repeat_interleave(groups // both.shape[1], 1).transpose(0, 1).to(torch.bfloat16).contiguous()
