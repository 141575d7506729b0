"""What compression changed in a model's predictions: perplexity, KL(dense ‖ compressed) and top-1 agreement on the
same tokens. Logits arrive in micro-batches, so that neither model has to be resident.

In a row of T tokens, positions 1 … T−1 predict the token that follows; all figures are means over those positions:

    perplexity = exp(mean −log q(x_{t+1}))        KL = mean Σ_v p_v (log p_v − log q_v)   [nats per token]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23  # logits of one chunk, 32 MiB in float32; about five such tensors live at once


@dataclass(frozen=True)
class Divergence:
    """The figures of a comparison.

    Attributes:
        perplexity_before: of the dense model, per token.
        perplexity_after: of the compressed model, per token.
        kl_divergence: mean KL(dense ‖ compressed), nats per token.
        top1_agreement: share of positions at which both models' most likely token is the same.
        kl_stderr: standard error of ``kl_divergence`` over rows; None with fewer than two rows.
        log_perplexity_stderr: the same of log(perplexity_after / perplexity_before), paired by row.
        tokens: predicted positions.
    """

    perplexity_before: float
    perplexity_after: float
    kl_divergence: float
    top1_agreement: float
    kl_stderr: float | None
    log_perplexity_stderr: float | None
    tokens: int


class Comparison:
    """Adds up the figures over micro-batches; sums are float64."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def update(self, dense_logits: Tensor, compressed_logits: Tensor, tokens: Tensor) -> None:
        """Counts the predictions of some rows.

        Args:
            dense_logits: (B, T, V) float, of the dense model.
            compressed_logits: (B, T, V) float, of the compressed model.
            tokens: (B, T) int64, what both models read; T ≥ 2.

        Raises:
            ValueError: the shapes do not belong together.
        """
        if dense_logits.shape != compressed_logits.shape or dense_logits.shape[:2] != tokens.shape:
            shapes = [tuple(x.shape) for x in (dense_logits, compressed_logits, tokens)]
            raise ValueError(f"logits and tokens do not match: {shapes}")
        if tokens.shape[1] < 2:
            raise ValueError("a row needs two tokens to predict one")
        step = max(1, _CHUNK_ELEMENTS // dense_logits.shape[2])
        for dense, compressed, row in zip(dense_logits, compressed_logits, tokens, strict=True):
            parts = [
                _chunk_sums(dense[a:b], compressed[a:b], row[a + 1 : b + 1])
                for a in range(0, len(row) - 1, step)
                for b in [min(a + step, len(row) - 1)]
            ]
            self._rows.append(torch.stack(parts).sum(0))

    def result(self) -> Divergence:
        """The figures over everything seen so far.

        Raises:
            ValueError: nothing was seen.
        """
        if not self._rows:
            raise ValueError("no predictions were compared")
        sums = torch.stack(self._rows)  # (rows, 5): both losses, KL, agreements, positions
        total = sums.sum(0)
        before, after, kl, agreed = (total[:4] / total[4]).tolist()
        means = sums[:, :4] / sums[:, 4:]
        return Divergence(
            perplexity_before=_exp(before),
            perplexity_after=_exp(after),
            kl_divergence=kl,
            top1_agreement=agreed,
            kl_stderr=_standard_error(means[:, 2]),
            log_perplexity_stderr=_standard_error(means[:, 1] - means[:, 0]),
            tokens=int(total[4]),
        )


def _chunk_sums(dense: Tensor, compressed: Tensor, following: Tensor) -> Tensor:
    """Sums over (t, V) logits that predict ``following`` (t,): losses of both, KL, agreements, positions; float64."""
    agreed = dense.argmax(-1) == compressed.argmax(-1)
    log_p, log_q = dense.float().log_softmax(-1), compressed.float().log_softmax(-1)
    following = following.to(log_p.device)[:, None]
    losses = [-log.gather(1, following).double().sum() for log in (log_p, log_q)]
    kl = (log_p - log_q).mul_(log_p.exp()).sum(-1)
    sums = [*losses, kl.double().sum(), agreed.double().sum(), torch.tensor(float(len(following)))]
    return torch.stack([s.cpu().double() for s in sums])


def _standard_error(row_means: Tensor) -> float | None:
    """Of the mean over rows of equal length: what a bootstrap over rows tends to, in closed form."""
    if len(row_means) < 2:
        return None
    return float(row_means.std() / math.sqrt(len(row_means)))


def _exp(mean_loss: float) -> float:
    """exp without an overflow error: a broken model's perplexity is infinite."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf if mean_loss == mean_loss else math.nan
