"""Quantization grids: which values a weight or an activation may take, and how it is rounded to them. Those of small
floating-point numbers are `llmcompress.core.floats`', other tables of levels `llmcompress.core.codebook`'s.

The arithmetic is that of the compressed-tensors checkpoints this project writes, so what is measured here is
what a loader computes: signed codes in [-2^(b-1), 2^(b-1) - 1], symmetric scale absmax / ((2^b - 1) / 2), and zero
always on the grid."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.core.codebook import KINDS, Table, best_scale, codebook, float_table, range_scale
from llmcompress.core.floats import FLOATS, LAYOUTS, all_codes, float_codes, float_scale, float_values
from llmcompress.core.notation import parse
from llmcompress.core.observe import least_error
from llmcompress.errors import UserError

#: entries that are rounded at once
PART_ENTRIES = 1 << 20
#: columns that share a scale, up to which torch is slow at finding their range
FEW = 32
#: entries from which a compiled kernel is used: a model that only runs, or few values, want no compiler
COMPILED_ENTRIES = 1 << 14


@dataclass(frozen=True)
class Levels:
    """A fitted grid of a (rows, cols) tensor cut into G groups along the columns.

    Attributes:
        scale: (rows or 1, G) float32 holding values of the dtype they will be stored in.
        zero_point: like ``scale``, integer-valued; None if symmetric.
        outer: scalar by which nvfp4's scales are multiplied to be stored; None elsewhere.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None

    def at(self, group: int) -> Levels:
        """The levels of one group, (rows or 1, 1)."""
        zero = self.zero_point
        return Levels(self.scale[:, group : group + 1], None if zero is None else zero[:, group : group + 1])


@dataclass(frozen=True)
class QuantGrid:
    """A grid and the part of a tensor that shares one scale.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        group: ``tensor``, ``channel`` (a weight's output row), ``token`` (an activation's row), or a number of
            consecutive columns.
        dynamic: activations only: the scale is taken from each input at run time, not from calibration.
        observer: ``minmax``, or ``mse`` to shrink the range where that lowers the rounding error; of static activations
            also ``percentile``, ``kl`` and ``entropy`` (see `observed_range`).
        kind: ``int``; small floating-point numbers, a key of `FLOATS`; or another table of levels, one of
            `llmcompress.core.codebook.KINDS`, for which ``mse`` is the scale of least squares.
        values: the table of a ``codebook``; () for one that suits normal weights.
        stochastic: seed of random rounding, up as likely as the value is near the upper level; None for the nearest.
    """

    bits: int = 8
    symmetric: bool = True
    group: str | int = "channel"
    dynamic: bool = False
    observer: str = "minmax"
    kind: str = "int"
    values: tuple[float, ...] = ()
    stochastic: int | None = None

    @staticmethod
    def parse_weights(value: object) -> QuantGrid:
        """Reads ``int8``, ``int4-g128-asym``, ``int8-tensor``, ``fp8``, ``power4`` or a mapping of the fields.

        Raises:
            UserError: unknown word, key, bits outside 2–8, or a grouping weights cannot have.
        """
        grid = parse(value, "weights", QuantGrid(group="channel"))
        if grid.group == "token" or grid.dynamic:
            raise UserError("weights have no tokens and do not change", "weights",
                            "group them by channel, tensor or a number")  # fmt: skip
        return grid

    @staticmethod
    def parse_activations(value: object) -> QuantGrid:
        """Reads ``int8`` (per token, dynamic), ``int8-static`` (per tensor), ``int8-tensor``, or a mapping."""
        grid = parse(value, "activations", QuantGrid(group="token", dynamic=True))
        if grid.group == "channel":
            raise UserError("a scale per input channel cannot be multiplied out", "activations",
                            "group by token or tensor")  # fmt: skip
        if not grid.dynamic and grid.group != "tensor":
            raise UserError("static scales cannot follow tokens", "activations",
                            "use group: tensor with dynamic: false")  # fmt: skip
        if grid.observer != "minmax" and grid.dynamic:
            raise UserError(f"observer {grid.observer} needs a static scale", "activations", "add dynamic: false")
        return grid

    @property
    def range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @cached_property
    def table(self) -> Table | None:
        """The levels before they are scaled; None for integers."""
        if self.kind == "int":
            return None
        return float_table(self.kind) if self.kind in FLOATS else codebook(self.kind, self.bits, self.values)

    def generator(self, name: str) -> torch.Generator | None:
        """What random rounding of the tensor of this name is drawn from; None where rounding is not random."""
        if self.stochastic is None:
            return None
        return torch.Generator().manual_seed(self.stochastic ^ zlib.crc32(name.encode()))

    def group_size(self, columns: int) -> int:
        """Columns that share a scale."""
        return self.group if isinstance(self.group, int) else columns

    def misfit(self, columns: int) -> str:
        """Why rows of ``columns`` inputs cannot have this grid, naming group sizes that fit; empty if they can."""
        size = self.group_size(columns)
        if columns % size == 0:
            return ""
        fits = [d for d in range(8, columns + 1) if columns % d == 0]
        near = sorted(sorted(fits, key=lambda d: abs(d - size))[:4])
        return f"group size {size} does not divide {columns} input columns; use one of {', '.join(map(str, near))}"

    def bits_per_weight(self, columns: int, scale_bits: int = 16) -> float:
        """Code bits plus the share of scale and zero point that one weight carries (rows: many)."""
        if self.group == "tensor":
            return float(self.bits)
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.group_size(columns)

    def fit(self, x: Tensor, scale_dtype: torch.dtype = torch.float32, column_weight: Tensor | None = None) -> Levels:
        """Scales and zero points for ``x``.

        Args:
            x: (rows, cols), finite.
            scale_dtype: the dtype scales will be stored in; they are rounded to it here, so that codes are
                chosen for the scale a loader reads.
            column_weight: (cols,) importance of each column's squared error for the ``mse`` observer; ones if None.

        Returns:
            Levels of shape (rows or 1, cols / group size).
        """
        low, high = self.bounds(x)
        if self.observer == "minmax":
            return self.levels(low, high, scale_dtype)
        grouped = self._grouped(x.float())
        weight = None if column_weight is None else self._grouped(column_weight.float().expand_as(x))
        if self.table is not None:
            size = grouped.shape[-1]
            weight = None if weight is None else weight.reshape(-1, size)
            scale = best_scale(grouped.reshape(-1, size), self.table, weight).view_as(low)
            return Levels(_storable(scale, scale_dtype))
        return Levels(*least_error(self, grouped, low, high, scale_dtype, weight))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each part of ``x`` (rows, cols) that shares a scale, and zero, (rows or 1, G)."""
        if isinstance(self.group, int) and self.group <= FEW and x.is_contiguous() and _compiles(x, torch.float32):
            return _kernels().ranges(x, self.group)
        grouped = self._grouped(x.float())
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def levels(
        self, low: Tensor, high: Tensor, scale_dtype: torch.dtype = torch.float32, most: Tensor | None = None
    ) -> Levels:
        """The grid over [low, high], where low ≤ 0 ≤ high, both (rows or 1, G); ``most`` as `float_scale` has it."""
        if self.kind in KINDS:
            assert self.table is not None
            return Levels(_storable(range_scale(self.kind, self.table, low, high), scale_dtype))
        if self.kind != "int":
            scale, outer = float_scale(self.kind, torch.maximum(-low, high), scale_dtype, most)
            return Levels(scale, None, outer)
        bottom, top = self.range
        span = float(top - bottom)
        if self.symmetric:
            scale = torch.maximum(-low, high) / (span / 2)
            return Levels(_storable(scale, scale_dtype))
        scale = _storable((high - low) / span, scale_dtype)
        return Levels(scale, torch.clamp(torch.round(bottom - low / scale), bottom, top))

    def quantize(self, x: Tensor, levels: Levels, generator: torch.Generator | None = None) -> Tensor:
        """Codes of ``x``, (rows, cols) int8. Zero gets the code that reads back as exactly zero.

        Args:
            generator: random rounding is drawn from it; None rounds to the nearest, whatever ``stochastic`` says.
        """
        if self.kind in FLOATS and generator is None and _compiles(x, torch.float32):
            return _kernels().codes(x, levels.scale, *LAYOUTS[self.kind])
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        for rows, scale, zero in _parts(x, levels):
            exact = self._grouped(x[rows].float()) / scale
            uniform = None if generator is None else torch.rand(exact.shape, generator=generator).to(x.device)
            codes[rows] = self._codes(exact if zero is None else exact.add_(zero), uniform).view_as(codes[rows])
        return codes

    def _codes(self, exact: Tensor, uniform: Tensor | None) -> Tensor:
        """Codes of values over their scales, which may be overwritten."""
        if self.table is None:
            exact = exact.round_() if uniform is None else exact.add_(uniform).floor_()
            return exact.clamp_(*self.range)
        if self.kind in KINDS:
            return self.table.index(exact, uniform) - self.table.middle
        if uniform is not None:
            exact = self.table.values.to(exact.device)[self.table.index(exact, uniform)]
        return float_codes(self.kind, exact)

    def dequantize(self, codes: Tensor, levels: Levels, out: Tensor | None = None) -> Tensor:
        """(rows, cols) float32 values of ``codes``, in ``out`` if that is given, contiguous."""
        values = torch.empty(codes.shape, device=codes.device) if out is None else out
        if self.kind in FLOATS and _compiles(codes, torch.int8):
            _kernels().values(codes, levels.scale, float_values(self.kind, all_codes(self.kind)), values)
            return values
        for rows, scale, zero in _parts(codes, levels):
            part = self._grouped(values[rows].copy_(self._plain(codes[rows])))
            (part if zero is None else part.sub_(zero)).mul_(scale)
        return values

    def _plain(self, codes: Tensor) -> Tensor:
        """Codes as the numbers that are scaled."""
        if self.table is None:
            return codes
        return self.table.read(codes) if self.kind in KINDS else float_values(self.kind, codes)

    def round(self, x: Tensor, levels: Levels, generator: torch.Generator | None = None) -> Tensor:
        """``x`` on the grid, float32."""
        return self.dequantize(self.quantize(x, levels, generator), levels)

    def round_activations(self, x: Tensor, levels: Levels | None = None) -> Tensor:
        """An activation as run time sees it: rounded per token, tensor or group, in its own dtype.

        Args:
            x: (..., features).
            levels: of a static grid, as fitted in calibration; None if dynamic.
        """
        if not x.numel():
            return x
        flat = x.reshape(-1, x.shape[-1])
        own = self.kind == "int" and self.symmetric and self.group != "tensor" and levels is None
        if own and _compiles(flat, torch.float32, torch.bfloat16):
            from llmcompress.core.kernels.round_cpu import round_rows

            return round_rows(flat.reshape(-1, self.group_size(flat.shape[1])), self.bits).view_as(x)
        if levels is None and self.group == "tensor":
            levels = self.fit(flat, x.dtype)
        rounded = torch.empty_like(flat)
        for rows in _slices(flat):
            rounded[rows] = self.round(flat[rows], levels or self.fit(flat[rows], x.dtype))
        return rounded.view_as(x)

    def _grouped(self, x: Tensor) -> Tensor:
        """(rows, cols) seen as (rows or 1, G, columns sharing a scale)."""
        if self.group == "tensor":
            return x.reshape(1, 1, -1)
        size = self.group_size(x.shape[1])
        return x.reshape(x.shape[0], x.shape[1] // size, size)


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded matrix as it will be stored.

    Attributes:
        codes: (out, in) int8.
        levels: scales (out or 1, groups) and zero points.
        grid: what they mean.
    """

    codes: Tensor
    levels: Levels
    grid: QuantGrid

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """(out, in) float32, in the memory of ``out`` if that is given, contiguous."""
        return self.grid.dequantize(self.codes, self.levels, out)


def _compiles(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a compiled kernel for tensors of these dtypes is worth its loading."""
    return x.device.type == "cpu" and x.dtype in dtypes and x.numel() >= COMPILED_ENTRIES


def _kernels() -> ModuleType:
    from llmcompress.core.kernels import floats_cpu

    return floats_cpu


def _slices(x: Tensor) -> Iterator[slice]:
    """Rows of ``x`` (rows, cols) few enough for their temporaries to stay in the cache."""
    step = max(PART_ENTRIES // max(x.shape[1], 1), 1)
    yield from (slice(first, first + step) for first in range(0, x.shape[0], step))


def _parts(x: Tensor, levels: Levels) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some rows of ``x`` (rows, cols) at a time, with their scales and zero points (rows or 1, G, 1)."""
    for rows in _slices(x):
        mine = slice(None) if len(levels.scale) == 1 else rows
        zero = None if levels.zero_point is None else levels.zero_point[mine, :, None]
        yield rows, levels.scale[mine, :, None], zero


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they read back from ``dtype``; an all-zero group gets the dtype's epsilon, as the format has it."""
    stored = scale.to(dtype).float()
    return torch.where(stored == 0, torch.finfo(dtype).eps, stored)
