"""Statistics of the rows that reach a group of matrices. Sums only, so they add up over micro-batches
and processes, and follow a rescaling of the inputs exactly, with no second pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

#: what a method may ask for
KINDS = frozenset({"absmax", "low", "high", "mean", "mean_abs", "squares", "gram", "rows"})


class InputStats:
    """Float32 statistics over ``count`` rows of ``width`` inputs.

    Attributes:
        count: rows seen.
        clip: rows were clamped to [-clip, clip] before they were counted; infinity if not.
        scale: (in,) what `rescale` divided the rows by so far; None if nothing.
        sums: per kind asked for, ``absmax``, ``low``, ``high`` (in,), ``mean`` Σx (in,), ``mean_abs`` Σ|x| (in,),
            ``squares`` Σx² (in,), ``gram`` XᵀX (in, in). Read them through the properties.
        rows: the raw row tensors themselves, (tokens, in) each, if ``rows`` was asked for; see `iter_rows`.
    """

    def __init__(
        self, width: int, needs: Iterable[str], device: torch.device | str = "cpu", clip: float = math.inf
    ) -> None:
        unknown = set(needs) - KINDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {sorted(KINDS)}")
        self.width, self.needs, self.count = width, frozenset(needs), 0
        self.clip = clip
        self.scale: Tensor | None = None
        self.rows: list[Tensor] = []
        self.sums = {
            kind: torch.zeros((width, width) if kind == "gram" else width, device=device)
            for kind in sorted(self.needs - {"rows"})
        }

    def update(self, x: Tensor) -> None:
        """Adds rows ``x``, (tokens, in), any float dtype."""
        self.count += x.shape[0]
        if "rows" in self.needs:
            self.rows.append(x)
        if x.shape[0] == 0 or not self.sums:
            return
        x32 = x.float()
        if self.clip < math.inf:
            x32 = x32.clamp(-self.clip, self.clip)
        for kind, total in self.sums.items():
            if kind == "absmax":
                torch.maximum(total, x32.abs().amax(0), out=total)
            elif kind == "low":
                torch.minimum(total, x32.amin(0), out=total)
            elif kind == "high":
                torch.maximum(total, x32.amax(0), out=total)
            elif kind == "mean":
                total += x32.sum(0)
            elif kind == "mean_abs":
                total += x32.abs().sum(0)
            elif kind == "squares":
                total += torch.linalg.vector_norm(x32, dim=0).square_()
            else:
                add_gram(total, x32, exact_in_bf16=x.dtype == torch.bfloat16 and self.clip == math.inf)

    def merge(self, other: InputStats) -> None:
        """Adds the statistics of other rows over the same inputs."""
        self.count += other.count
        self.rows += other.rows
        for kind, total in self.sums.items():
            if kind in ("absmax", "high"):
                torch.maximum(total, other.sums[kind], out=total)
            elif kind == "low":
                torch.minimum(total, other.sums[kind], out=total)
            else:
                total += other.sums[kind]

    def rescale(self, s: Tensor) -> None:
        """Follows the division of every input column by ``s`` (in,)."""
        self.scale = s if self.scale is None else self.scale * s
        for kind, total in self.sums.items():
            if kind == "squares":
                total /= s.square()
            elif kind == "gram":
                total.div_(s).div_(s[:, None])
            else:
                total /= s

    def iter_rows(self) -> Iterator[Tensor]:
        """The rows as counted, (tokens, in) float32 each: clamped, then divided by the smoothing."""
        for x in self.rows:
            x = x.float()
            if self.clip < math.inf:
                x = x.clamp(-self.clip, self.clip)
            yield x if self.scale is None else x / self.scale

    @property
    def absmax(self) -> Tensor:
        """(in,) largest |x|."""
        return self.sums["absmax"]

    @property
    def low(self) -> Tensor:
        """(in,) lowest x, at most 0."""
        return self.sums["low"]

    @property
    def high(self) -> Tensor:
        """(in,) highest x, at least 0."""
        return self.sums["high"]

    @property
    def mean(self) -> Tensor:
        """(in,) mean of x."""
        return self.sums["mean"] / max(self.count, 1)

    @property
    def mean_abs(self) -> Tensor:
        """(in,) mean of |x|."""
        return self.sums["mean_abs"] / max(self.count, 1)

    @property
    def rms(self) -> Tensor:
        """(in,) root mean square per token."""
        squares = self.sums["squares"] if "squares" in self.sums else self.sums["gram"].diagonal()
        return (squares / max(self.count, 1)).sqrt()

    @property
    def gram(self) -> Tensor:
        """(in, in) H = XᵀX / tokens."""
        return self.sums["gram"] / max(self.count, 1)


def add_gram(total: Tensor, x: Tensor, exact_in_bf16: bool = False) -> None:
    """``total += xᵀx`` for float32 ``x`` (tokens, in).

    Where every value of ``x`` is a bfloat16 number the products are exact in float32, so the CPU's
    bfloat16 units may do them: twice the speed, the same sums.
    """
    if exact_in_bf16 and x.device.type == "cpu":
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time, unknown to checkers
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            total.addmm_(x.T, x)
        finally:
            matmul.fp32_precision = before
    else:
        total.addmm_(x.T, x)
