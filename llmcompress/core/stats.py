"""Statistics of the rows that reach a group of matrices. Sums only, so they add up over micro-batches
and processes, and follow a rescaling of the inputs exactly, with no second pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from llmcompress.core.kernels import gram_cpu
from llmcompress.core.kernels.moments_cpu import add_squares

#: what a method may ask for
KINDS = frozenset({"absmax", "low", "high", "mean", "mean_abs", "squares", "gram", "cross", "rows"})

#: from this width on the symmetric update of BLAS is faster on a CPU
SYRK_WIDTH = 1024
#: columns of the products that make up a narrower Gram matrix
GRAM_BLOCK = 128
#: entries of rows that are taken to float32 at once: little enough for memory that was used before
UPDATE_ENTRIES = 6 << 20


class InputStats:
    """Float32 statistics over ``count`` rows of ``width`` inputs.

    Attributes:
        count: rows seen.
        length: tokens per sample, if the rows are whole samples in order; 0 if that is not known.
        clip: rows were clamped to [-clip, clip] before they were counted; infinity if not.
        scale: (in,) what `rescale` divided the rows by so far; None if nothing.
        sums: per kind asked for, ``absmax``, ``low``, ``high`` (in,), ``mean`` Σx (in,), ``mean_abs`` Σ|x| (in,),
            ``squares`` Σx² (in,), ``gram`` XᵀX (in, in; only its upper triangle is
            kept up), ``cross`` X̄ᵀX (in, in) with X̄ the dense model's rows for the same tokens.
            Read them through the properties.
        rows: the raw row tensors themselves, (tokens, in) each, if ``rows`` was asked for; see `iter_rows`.
    """

    def __init__(
        self,
        width: int,
        needs: Iterable[str],
        device: torch.device | str = "cpu",
        clip: float = math.inf,
        length: int = 0,
    ) -> None:
        unknown = set(needs) - KINDS
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {sorted(KINDS)}")
        self.width, self.needs, self.count = width, frozenset(needs), 0
        self.clip, self.length = clip, length
        self.scale: Tensor | None = None
        self.rows: list[Tensor] = []
        self.sums = {
            kind: torch.zeros((width, width) if kind in ("gram", "cross") else width, device=device)
            for kind in sorted(self.needs - {"rows"})
        }

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Adds rows ``x``, (tokens, in), any float dtype.

        Args:
            dense: the same tokens' rows in the dense model, (tokens, in); needed for ``cross`` alone.

        Raises:
            ValueError: ``cross`` was asked for and there are no dense rows.
        """
        if "cross" in self.needs and dense is None:
            raise ValueError("cross statistics need the dense model's rows")
        self.count += x.shape[0]
        if "rows" in self.needs:
            self.rows.append(x)
        if x.shape[0] == 0 or not self.sums:
            return
        whole, rest = self.clip == math.inf, set(self.sums)
        if whole and "gram" in rest and gram_cpu.multiplies(x):
            add_gram(self.sums["gram"], x)
            rest.remove("gram")
        if whole and rest == {"squares"} and x.device.type == "cpu":
            add_squares(self.sums["squares"], x)
            return
        if not rest:
            return
        parts = ((part, part) for part in pieces(x)) if dense is None else zip(pieces(x), pieces(dense), strict=True)
        for part, same in parts:
            self._add(rest, part, same)

    def _add(self, kinds: set[str], x32: Tensor, dense: Tensor) -> None:
        if self.clip < math.inf:
            x32 = x32.clamp(-self.clip, self.clip)
        for kind in sorted(kinds):
            total = self.sums[kind]
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
                if x32.device.type == "cpu":
                    add_squares(total, x32)
                else:
                    total += torch.linalg.vector_norm(x32, dim=0).square_()
            elif kind == "gram":
                add_gram(total, x32)
            else:
                total.addmm_(dense.T, x32)

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
            elif kind in ("gram", "cross"):
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
        """(in, in) H = XᵀX / tokens, a new tensor."""
        return mirror(self.sums["gram"] / max(self.count, 1))

    def take_gram(self) -> Tensor:
        """`gram` in the memory of the sums, which are gone then: for the last step that reads it."""
        return mirror(self.sums.pop("gram").div_(max(self.count, 1)))

    @property
    def cross(self) -> Tensor:
        """(in, in) C = X̄ᵀX / tokens, X̄ the dense model's rows, a new tensor."""
        return self.sums["cross"] / max(self.count, 1)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Rows ``x`` (tokens, in) in float32, a few thousand at a time, each good until the next is asked for."""
    parts = x.split(max(UPDATE_ENTRIES // x.shape[1], 1))
    room = None if x.dtype == torch.float32 else torch.empty(parts[0].shape, device=x.device)
    for part in parts:
        yield part if room is None else room[: len(part)].copy_(part)


def add_gram(total: Tensor, x: Tensor) -> None:
    """``total += xᵀx`` for float32 or bfloat16 ``x`` (tokens, in); only the upper triangle of ``total`` counts.

    Half the work of a matrix product: our kernel for bfloat16 where the processor has the instruction, else BLAS's
    symmetric update on a CPU, or products of blocks of columns. Narrow matrices take the blocks on a CPU too: waking
    the threads of a second library would cost more than it saves.
    """
    width = x.shape[1]
    if gram_cpu.multiplies(x):
        gram_cpu.add_gram(total, x)
        return
    for part in pieces(x):
        if x.device.type == "cpu" and width >= SYRK_WIDTH:
            # row-major upper is column-major lower; the update happens inside of ``total``
            ssyrk(1.0, part.contiguous().numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=1, lower=1)
            continue
        for i in range(0, width, GRAM_BLOCK):
            total[i : i + GRAM_BLOCK, i:].addmm_(part[:, i : i + GRAM_BLOCK].T, part[:, i:])


def mirror(matrix: Tensor, block: int = 512) -> Tensor:
    """Copies the upper triangle of a square ``matrix`` over the lower one, in place, and returns it."""
    for i in range(0, len(matrix), block):
        rows = slice(i, i + block)
        matrix[i + block :, rows] = matrix[rows, i + block :].T
        corner = matrix[rows, rows].triu()
        matrix[rows, rows] = corner + corner.triu(1).T
    return matrix
