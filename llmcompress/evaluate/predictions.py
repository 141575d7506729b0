"""What one model predicted, token by token, alone or beside a reference, from logits that arrive in micro-batches.

Per predicted token x, with p the reference's and q the model's distribution over the vocabulary:

    loss = −log q(x)        KL = Σ_v p_v (log p_v − log q_v)   [nats]
    top-1 = the most likely tokens are the same        top-5 = |top5(p) ∩ top5(q)| / 5"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.evaluate.windows import Window

_CHUNK_ELEMENTS = 1 << 23  # logits of one chunk, 32 MiB in float32; about five such tensors live at once
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """One entry per predicted token, in the order of the windows; all arrays have the same length.

    Attributes:
        window: index of the window, int64.
        context: tokens the prediction was made from, int64.
        token: the predicted token's id, int64.
        loss: of the model, nats, float64.
        reference_loss, kl, top1, top5: beside the reference, float64; None without one.
    """

    window: NDArray[np.int64]
    context: NDArray[np.int64]
    token: NDArray[np.int64]
    loss: NDArray[np.float64]
    reference_loss: NDArray[np.float64] | None = None
    kl: NDArray[np.float64] | None = None
    top1: NDArray[np.float64] | None = None
    top5: NDArray[np.float64] | None = None


class Scores:
    """Takes logits of windows in any order and puts the tokens' scores together.

    Args:
        windows: all that will come.
    """

    def __init__(self, windows: list[Window]) -> None:
        self._windows = windows
        self._found: list[Tensor | None] = [None] * len(windows)

    def update(self, indices: list[int], logits: Tensor, reference: Tensor | None = None) -> None:
        """Scores some windows.

        Args:
            indices: which.
            logits: (B, t, V) of the model.
            reference: (B, t, V) of the reference.
        """
        for row, index in enumerate(indices):
            targets = self._windows[index].targets
            count = len(targets)
            step = max(1, _CHUNK_ELEMENTS // logits.shape[2])
            parts = []
            for start in range(0, count, step):
                stop = min(start + step, count)
                place = slice(logits.shape[1] - count + start, logits.shape[1] - count + stop)
                beside = None if reference is None else reference[row, place]
                parts.append(_token_scores(logits[row, place], beside, targets[start:stop]))
            self._found[index] = torch.cat(parts, dim=1)

    def result(self) -> Predictions:
        """All scores, once every window has come."""
        scores = [found for found in self._found if found is not None]
        assert len(scores) == len(self._windows)
        columns = torch.cat(scores, dim=1).numpy()
        counts = [len(w.targets) for w in self._windows]
        return Predictions(
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.arange(w.first, w.first + len(w.targets)) for w in self._windows]),
            torch.cat([w.targets for w in self._windows]).numpy(),
            *columns,
        )


def _token_scores(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    """(1, t) losses, or (5, t) losses of model and reference, KL, top-1 and top-5, float64 on the CPU."""
    targets = targets.to(logits.device)[:, None]
    log_q = logits.float().log_softmax(-1)
    loss = -log_q.gather(1, targets)[:, 0]
    if reference is None:
        return loss.double()[None].cpu()
    reference = reference.to(logits.device)
    log_p = reference.float().log_softmax(-1)
    best_q, best_p = (x.topk(min(TOP, x.shape[1]), dim=1).indices for x in (logits, reference))
    top1 = logits.argmax(1) == reference.argmax(1)
    shared = (best_q[:, :, None] == best_p[:, None, :]).any(2).float().mean(1)
    reference_loss = -log_p.gather(1, targets)[:, 0]
    kl = (log_p - log_q).mul_(log_p.exp()).sum(-1)
    return torch.stack([x.double() for x in (loss, reference_loss, kl, top1, shared)]).cpu()
