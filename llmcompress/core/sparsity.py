"""How many weights are zero, and which: a ratio per row or block, or N kept of every M inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmcompress.core.kernels import select_cpu
from llmcompress.errors import UserError


@dataclass(frozen=True)
class Sparsity:
    """Either a ratio of zeros, or N weights kept of every M consecutive inputs.

    Attributes:
        ratio: share of zeros in [0, 1). For N:M it is ``1 - n/m``.
        n, m: N:M pattern, both 0 for an unstructured ratio.
    """

    ratio: float
    n: int = 0
    m: int = 0

    @staticmethod
    def parse(value: object) -> Sparsity:
        """Reads ``0.5`` or ``"2:4"``.

        Raises:
            UserError: the ratio is outside [0, 1), or not 0 < N < M.
        """
        text = str(value).strip()
        pattern = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if pattern:
            n, m = int(pattern[1]), int(pattern[2])
            if not 0 < n < m:
                raise UserError(f"pattern {text} does not keep 0 < N < M weights", "sparsity", "write N:M such as 2:4")
            return Sparsity(1 - n / m, n, m)
        try:
            ratio = float(text)
        except ValueError:
            raise UserError(
                f"'{text}' is no sparsity", "sparsity", "write a ratio such as 0.5, or N:M such as 2:4"
            ) from None
        if not 0 <= ratio < 1:
            raise UserError(f"{text} is outside [0, 1)", "sparsity", "write a ratio such as 0.5, or N:M such as 2:4")
        return Sparsity(ratio)

    def ramped(self, ramp: float, span: tuple[float, float]) -> Sparsity:
        """That of a block where the ratio grows evenly by ``ramp`` from the first weights of the model to the last.

        The total stays what it is, whatever the sizes of the blocks.

        Args:
            span: shares of all weights that lie before the block, and up to its end.
        """
        return replace(self, ratio=self.ratio + ramp * ((span[0] + span[1]) / 2 - 0.5))

    def check_ramp(self, ramp: float) -> None:
        """Raises UserError if the ratio cannot grow by ``ramp``."""
        if ramp and self.m:
            raise UserError(f"the pattern {self} is the same in every block", "prune.ramp", "leave it out")
        if self.ratio - abs(ramp) / 2 < 0 or self.ratio + abs(ramp) / 2 >= 1:
            low, high = self.ratio - ramp / 2, self.ratio + ramp / 2
            raise UserError(f"ratios from {low:g} to {high:g} leave [0, 1)", "prune.ramp", "ramp less, e.g. 0.1")

    def check_ratios(self, ratios: tuple[float, ...] | Literal["auto"]) -> None:
        """Raises UserError if the blocks cannot have these ratios in place of this one."""
        if ratios and self.m:
            raise UserError(f"the pattern {self} is the same in every block", "prune.ratios", "leave them out")
        if ratios == "auto" and not self.ratio:
            raise UserError("there are no zeros to share out", "prune.ratios", "leave them out, or ask for zeros")
        if ratios != "auto" and any(not 0 <= ratio < 1 for ratio in ratios):
            raise UserError(f"{list(ratios)} leave [0, 1)", "prune.ratios", "give shares of zeros, one per block")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{self.ratio:g}"

    def misfit(self, columns: int) -> str:
        """Why this pattern cannot be applied to rows of ``columns`` inputs; empty if it can."""
        if not self.m or columns % self.m == 0:
            return ""
        fits = [str(m) for m in (2, 4, 8, 16, 32) if columns % m == 0]
        return f"pattern {self} does not divide {columns} input columns" + (
            f"; use an M of {', '.join(fits)}" if fits else ""
        )

    def zeros_of(self, count: int) -> int:
        """Number of zeros among ``count`` weights: exact for N:M, rounded to nearest for a ratio."""
        return count // self.m * (self.m - self.n) if self.m else round(self.ratio * count)

    def keep_mask(self, score: Tensor) -> Tensor:
        """True where a weight is kept; the lowest scores go.

        A ratio is applied within each output row (the comparison group of Wanda), N:M within every
        M consecutive inputs. Counts are exact: ties are broken by position, never all dropped.

        Args:
            score: (out, in), any float dtype; higher is more important.

        Returns:
            (out, in) bool.
        """
        grouped = score.reshape(-1, self.m or score.shape[1])
        drop = self.zeros_of(grouped.shape[1])
        if grouped.device.type == "cpu" and grouped.dtype == torch.float32:
            return select_cpu.keep_highest_of_each(grouped.contiguous(), drop).view_as(score)
        keep = torch.ones_like(grouped, dtype=torch.bool)
        if drop:
            keep.scatter_(-1, _lowest(grouped, drop), False)
        return keep.view_as(score)


def zero_dropped(values: Tensor, keep: Tensor) -> None:
    """Zeroes ``values`` in place where ``keep`` is False: as torch's `masked_fill_`, which takes four times as long."""
    if values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous():
        select_cpu.zero_dropped(values, keep.contiguous())
    else:
        values.masked_fill_(~keep, 0.0)


def count_nonzero(values: Tensor) -> int:
    """As torch's, which takes many times as long."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16) and values.is_contiguous():
        return select_cpu.count_nonzero(values)
    return int(values.count_nonzero())


def _lowest(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores along the last axis."""
    return torch.topk(score, count, dim=-1, largest=False, sorted=False).indices
