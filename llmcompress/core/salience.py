"""Activation-range salience (JSQ, ICML 2024): how wide an output still swings when one weight is removed.

    SS[r, i] = max_t(Y[t, r] − X[t, i] W[r, i]) − min_t(Y[t, r] − X[t, i] W[r, i])

Exact over all tokens, at little more than the cost of Y = X Wᵀ itself (taking every weight out in turn costs a Y
per input). Three identities carry it:

- SS does not change when a constant is added to an input column, since max and min move alike. So X is centred
  first: outputs keep their precision beside large constant inputs, and the bounds below are tight.
- What is ranked is SS − range(Y_r): the same order within a row, without the large common part that would drown
  the differences between weights in rounding.
- max_t(Y_t − X_ti W_i) is found among the tokens with the largest Y (`kernels.range_scan`), and tokens may come
  in chunks: the running maximum of one chunk is where the next starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcompress.core.kernels import range_scan
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError

#: inputs of one chunk of tokens
_CHUNK_BYTES = 384 << 20
#: outputs of one block of rows
_OUTPUT_BYTES = 32 << 20
_BLOCK_ROWS = 1024


class CentredRows:
    """All counted rows of an input, minus a common centre, in chunks of bounded size.

    Prepared once for the matrices that share the input. One chunk is kept; several are made anew in every pass.
    """

    def __init__(self, stats: InputStats, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self.stats, self.width = stats, stats.width
        self.tokens = sum(x.shape[0] for x in stats.rows)
        self.chunk_tokens = min(self.tokens, max(chunk_bytes // (4 * self.width), 1))
        self._centre: Tensor | None = None
        self._only: tuple[Tensor, range_scan.Extremes | None] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, range_scan.Extremes | None]]:
        """(tokens, in) float32 with its column extremes (CPU only)."""
        if self._only is not None:
            yield self._only
            return
        for x in self._buffers():
            if self._centre is None:
                self._centre = x.mean(0, dtype=torch.float64).float()  # of a constant column: exactly the constant
            x -= self._centre
            chunk = x, range_scan.column_extremes(x) if x.device.type == "cpu" else None
            if x.shape[0] == self.tokens:
                self._only = chunk
            yield chunk

    def _buffers(self) -> Iterator[Tensor]:
        """The rows in private tensors of at most ``chunk_tokens``."""
        left, filled, buffer = self.tokens, 0, torch.empty(0, self.width)
        for x in self.stats.iter_rows():
            while x.shape[0]:
                if filled == 0:
                    buffer = x.new_empty(min(left, self.chunk_tokens), self.width)
                taken = min(buffer.shape[0] - filled, x.shape[0])
                buffer[filled : filled + taken] = x[:taken]
                filled, left, x = filled + taken, left - taken, x[taken:]
                if filled == buffer.shape[0]:
                    yield buffer
                    filled = 0


class RangeScan:
    """How far the outputs of some matrix rows swing without each of their weights, over the tokens seen so far.

    Scans of different tokens, on other processes for instance, merge: maxima of maxima.

    Args:
        weight: (out, in) float32, contiguous.

    Attributes:
        peaks: (2, out) largest Y and largest −Y.
        best: (2, out, in) how much higher (or lower, negative) the largest is without the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.peaks = torch.full((2, weight.shape[0]), -torch.inf, device=weight.device)
        self.best = torch.full((2, *weight.shape), -torch.inf, device=weight.device)

    def add(self, x: Tensor, extremes: range_scan.Extremes | None) -> None:
        """Sees tokens ``x`` (tokens, in) float32; with their column extremes where the compiled kernel is to run."""
        y = self.weight @ x.T
        if extremes is None:
            raise_extremes(y, x, self.weight, self.peaks, self.best)
        else:
            range_scan.raise_extremes(y, x, self.weight, extremes, self.peaks, self.best)

    def merge(self, other: RangeScan) -> None:
        """Sees the tokens of another scan of the same weights, whose rows were centred alike."""
        peaks = torch.maximum(self.peaks, other.peaks)
        ours, theirs = ((peaks - scan.peaks)[..., None] for scan in (self, other))
        self.best = torch.maximum(self.best - ours, other.best - theirs)
        self.peaks = peaks

    @property
    def excess(self) -> Tensor:
        """(out, in) SS[r, i] − range(Y_r)."""
        return self.best[0] + self.best[1]


def range_excess(weight: Tensor, rows: CentredRows) -> Tensor:
    """SS[r, i] − range(Y_r): by how much removing a weight widens (or, negative, narrows) its output's range.

    Args:
        weight: (out, in), any float dtype.
        rows: the inputs. Without any token the excess is zero.

    Returns:
        (out, in) float32; within 1e-5 of the row's range of the float64 definition.
    """
    excess = torch.zeros(weight.shape, device=weight.device)
    if rows.tokens == 0:
        return excess
    step = min(_BLOCK_ROWS, max(_OUTPUT_BYTES // (4 * rows.chunk_tokens), 16))
    for start in range(0, weight.shape[0], step):
        scan = RangeScan(weight[start : start + step].float().contiguous())
        for x, extremes in rows:
            scan.add(x, extremes)
        excess[start : start + step] = scan.excess
    return excess


def averaged_samples(stats: InputStats) -> InputStats:
    """Statistics whose rows are the mean over the samples, token by token, as the released code of JSQ takes them
    before it looks for the range: for comparison alone, as N samples have about a √N-th of the range then.

    Raises:
        UserError: the rows are not whole samples (an expert saw some tokens only).
    """
    length = stats.length
    if not length or any(x.shape[0] % length for x in stats.rows):
        raise UserError("its rows are not whole samples, which cannot be averaged", fix="set average_samples: false")
    total = torch.zeros(length, stats.width, device=stats.rows[0].device if stats.rows else None)
    for x in stats.iter_rows():
        total += x.view(-1, length, stats.width).sum(0)
    averaged = InputStats(stats.width, {"rows"}, total.device)
    averaged.update(total / max(stats.count // length, 1))
    return averaged


def raise_extremes(y: Tensor, x: Tensor, weight: Tensor, peaks: Tensor, best: Tensor) -> None:
    """The sorted-token scan in plain torch, for any device: the readable form of the CPU kernel.

    Shapes as in `kernels.range_scan.raise_extremes`; ``peaks`` and ``best`` are updated.
    """
    reach = weight.abs() * x.abs().amax(0)  # (rows, in): no token gains more than this
    for side, sign in enumerate((1, -1)):
        sorted_y, order = (sign * y).sort(dim=1, descending=True)
        peak = torch.maximum(peaks[side], sorted_y[:, 0])
        best[side] -= (peak - peaks[side])[:, None]
        peaks[side] = peak
        gaps = peak[:, None] - sorted_y
        is_open = torch.arange(len(y), device=y.device)  # rows with an input that the next token could raise
        for k in range(y.shape[1]):
            gap = gaps[is_open, k, None]
            value = -gap - sign * x[order[is_open, k]] * weight[is_open]
            best[side, is_open] = torch.maximum(best[side, is_open], value)
            if k + 1 < y.shape[1]:
                can_rise = reach[is_open] - best[side, is_open] > gaps[is_open, k + 1, None]
                is_open = is_open[can_rise.any(1)]
            if len(is_open) == 0:
                break
