"""Which tokens a model sees when it predicts which: the windows of a document.

*Rolling* windows are those of lm-eval's ``loglikelihood_rolling``, with a stride. Before the document stands one prefix
token (beginning of sequence, or end if there is none). The first window predicts the first L tokens from the prefix on;
each later one ends S tokens further on, has the L tokens before its end as input and predicts the last S. So each token
is predicted exactly once, and from the second window on from at least L − S + 1 tokens. With S = L, the default, these
are lm-eval's windows; a smaller S gives more context, at L / S times the cost.

*Rows* are what the papers on compression use: the document is cut into rows of L tokens, no prefix; a row's first token
is never predicted, and an incomplete last row is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: the two conventions
KINDS = ("rolling", "rows")


@dataclass(frozen=True)
class Window:
    """One forward's worth of a document.

    Attributes:
        inputs: (t,) int64 token ids that the model reads.
        targets: (n,) int64, n ≤ t: what the last n of its outputs predict.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def first(self) -> int:
        """Tokens that the first prediction is made from."""
        return len(self.inputs) - len(self.targets) + 1


def rolling_windows(tokens: list[int], prefix: int | None, length: int, stride: int) -> list[Window]:
    """Windows of at most ``length`` inputs that together predict every token of a document once.

    Args:
        tokens: of the document; not empty.
        prefix: token that stands before it; without one the first token is not predicted.
        length: L ≥ 1.
        stride: S, 1 ≤ S ≤ L.
    """
    stream = torch.tensor(tokens if prefix is None else [prefix, *tokens])
    last = len(stream) - 1  # position of the last token, which is never an input
    windows = []
    predicted = 0
    while predicted < last:
        count = min(last - predicted, stride if predicted else length)
        end = predicted + count
        windows.append(Window(stream[max(0, end - length) : end], stream[predicted + 1 : end + 1]))
        predicted = end
    return windows


def row_windows(tokens: list[int], length: int) -> list[Window]:
    """Rows of ``length`` tokens; each predicts its tokens 2 … L."""
    rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return [Window(row[:-1], row[1:]) for row in rows]


def batches_of(windows: list[Window], limit: int) -> list[list[int]]:
    """Indices of windows to run together: of equal length, so that none is padded, and about ``limit`` tokens.

    The order of the windows is kept among those of one length.
    """
    by_length: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        by_length.setdefault(len(window.inputs), []).append(index)
    batches = []
    for length, indices in sorted(by_length.items(), reverse=True):
        size = max(1, limit // length)
        batches += [indices[i : i + size] for i in range(0, len(indices), size)]
    return batches
