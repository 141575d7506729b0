"""Grids of small floating-point numbers, with the arithmetic of the compressed-tensors formats that hold them.

| kind    | a code           | a scale for each                | a scale is                                          |
|---------|------------------|---------------------------------|-----------------------------------------------------|
| `fp8`   | e4m3, up to 448  | channel, tensor or token        | absmax / 448, in the model's dtype                  |
| `nvfp4` | e2m1, up to 6    | 16 columns                      | absmax / 6 as e4m3, times one float32 per tensor    |
| `mxfp4` | e2m1, up to 6    | 32 columns                      | a power of two (OCP Microscaling Formats 1.0)       |

nvfp4's outer scale puts the largest group at e4m3's largest value. e2m1 codes are sign · 8 + index of the magnitude;
halves round to the even index, as float arithmetic does."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

#: kind → bits of a code, columns that share a scale (0: not in groups)
FLOATS = {"fp8": (8, 0), "nvfp4": (4, 16), "mxfp4": (4, 32)}
#: kind → mantissa bits, exponent bias and code of the largest magnitude, and whether a zero has a sign
LAYOUTS = {"fp8": (3, 7, 0x7E, True), "nvfp4": (1, 1, 7, False), "mxfp4": (1, 1, 7, False)}
E4M3 = torch.float8_e4m3fn
E4M3_MOST = 448.0
E2M1_MOST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(_MAGNITUDES))


def float_scale(kind: str, absmax: Tensor, dtype: torch.dtype, most: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scale of each group, and nvfp4's outer one, by which scales are multiplied to be stored.

    Args:
        kind: key of FLOATS.
        absmax: (rows or 1, G) of each group.
        dtype: that fp8's scales are stored in.
        most: scalar that nvfp4's outer scale is taken from, where several matrices share it; None for ``absmax``'s own.

    Returns:
        (rows or 1, G) float32 and, for nvfp4, a scalar float32.
    """
    if kind == "fp8":
        scale = (absmax / E4M3_MOST).to(dtype).float()
        return torch.where(scale == 0, torch.finfo(dtype).eps, scale), None
    if kind == "mxfp4":
        mantissa, exponent = torch.frexp(absmax)
        # What lies above 7/4 of a power of two is nearer to the next; 2 of the exponent are e2m1's own.
        exponent = exponent - 1 + (mantissa >= 0.875).int() - 2
        return torch.where(absmax == 0, 1.0, torch.exp2(exponent.clamp(-126, 125).float())), None
    most = absmax.amax() if most is None else most
    outer = E4M3_MOST * E2M1_MOST / torch.where(most == 0, 1.0, most).float()
    inner = (absmax / E2M1_MOST * outer).clamp(max=E4M3_MOST).to(E4M3).float()
    return torch.where(inner == 0, torch.finfo(E4M3).eps, inner) / outer, outer


def float_codes(kind: str, exact: Tensor) -> Tensor:
    """The codes nearest to ``exact``, values over their scales: int8, for fp8 the bits of an e4m3."""
    if kind == "fp8":
        return exact.clamp(-E4M3_MOST, E4M3_MOST).to(E4M3).view(torch.int8)
    magnitude = exact.abs()
    index = torch.zeros_like(exact, dtype=torch.int8)
    for number, middle in enumerate(_MIDDLES):
        index += (magnitude >= middle if number % 2 else magnitude > middle).to(torch.int8)
    return index + 8 * (torch.signbit(exact) & (index > 0)).to(torch.int8)


def all_codes(kind: str) -> Tensor:
    """int8 codes by their bits."""
    return torch.arange(1 << FLOATS[kind][0], dtype=torch.uint8).view(torch.int8)


def float_values(kind: str, codes: Tensor) -> Tensor:
    """float32 values of ``codes``."""
    if kind == "fp8":
        return codes.view(E4M3).float()
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=codes.device)
    return table[codes.int()]
