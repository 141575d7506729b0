"""Beyond one sweep: aiming at the dense model's outputs, and solving for what a mask keeps.

With X̄ the dense model's rows and X those of the compressed model for the same tokens, the outputs to meet are W X̄
(cf. GPTAQ, arXiv:2504.02692). With H = XᵀX and C = X̄ᵀX, min ‖W X̄ − Q X‖² is the sweep's problem on W' = W C H⁻¹.

Given a mask, the best values of the kept weights solve one least-squares problem per row, Q_K = (W H)_K (H_KK)⁻¹.
Conjugate gradients do so for all rows at once, for one matrix product with H a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.sweep import Factor

#: a refit stops when a step lowers the loss by less than this share of it
LEAST_GAIN = 1e-3
MOST_STEPS = 100


def aim_at_dense(weight: Tensor, H: Tensor, C: Tensor, factor: Factor) -> Tensor:
    """W' = W (C + λI)(H + λI)⁻¹: C is damped as H is, so that equal rows leave W as it is.

    Args:
        weight: (out, in) W.
        H, C: (in, in) Gram matrix of the rows, and cross-Gram of the dense rows (first axis) and the rows.
        factor: of H.
    """
    correction = weight @ (C - H)
    correction = torch.linalg.solve_triangular(factor.V.T, correction, upper=False, left=False)
    return weight + torch.linalg.solve_triangular(factor.V, correction, upper=True, left=False)


@dataclass(frozen=True)
class LeastSquares:
    """min ‖(Q − W) (H + λI)^½‖² over the entries a mask keeps.

    Attributes:
        W: (out, in) what to meet.
        H: (in, in) Gram matrix, undamped.
        ridge: λ.
    """

    W: Tensor
    H: Tensor
    ridge: float

    def gradient(self, Q: Tensor) -> Tensor:
        """(out, in) (W − Q)(H + λI): minus half the gradient."""
        return self._times_H(self.W - Q)

    def loss(self, Q: Tensor) -> Tensor:
        """(out,) loss of each row."""
        return (self.gradient(Q) * (self.W - Q)).sum(1)

    def _times_H(self, E: Tensor) -> Tensor:
        return torch.addmm(E, E, self.H, beta=self.ridge)

    @property
    def diagonal(self) -> Tensor:
        """(in,) of H + λI."""
        return (self.H.diagonal() + self.ridge).clamp(min=torch.finfo(self.H.dtype).tiny)

    def refit(self, keep: Tensor, start: Tensor, least_gain: float = LEAST_GAIN) -> tuple[Tensor, Tensor]:
        """The kept weights' optimum by preconditioned conjugate gradients.

        Args:
            keep: (out, in) bool.
            start: (out, in); what is not kept stays as it is here, zero or not.
            least_gain: steps end when one lowers the loss by less than this share of it.

        Returns:
            (out, in) values, and the (out,) loss of each row: at most that of ``start``.
        """
        inverse = keep / self.diagonal  # the preconditioner, and the projection onto the kept
        Q, residual = start.clone(), self.gradient(start)
        loss = (residual * (self.W - start)).sum(1)
        direction = residual * inverse
        slope = (residual * direction).sum(1)
        for _ in range(MOST_STEPS):
            curved = self._times_H(direction)
            step = slope / (curved * direction).sum(1).clamp(min=torch.finfo(Q.dtype).tiny)
            gain = step * slope
            if not float(gain.sum()) > least_gain * float(loss.sum()):  # nothing is left to gain where both are zero
                break
            loss = loss - gain
            Q.addcmul_(direction, step[:, None])
            residual.addcmul_(curved, -step[:, None])
            preconditioned = residual * inverse
            before, slope = slope, (residual * preconditioned).sum(1)
            ratio = slope / before.clamp(min=torch.finfo(Q.dtype).tiny)
            direction = torch.addcmul(preconditioned, direction, ratio[:, None])
        return Q, loss

    def drop_and_grow(self, keep: Tensor, Q: Tensor, loss: Tensor, m: int = 0, share: float = 0.02) -> tuple:
        """Moves the worst-placed zeros: kept weights of least Q_j² H_jj go, dropped ones of most (G_j)² / H_jj come
        back, G = (W − Q)H, then a refit. Rows that do not gain stay as they were.

        Args:
            keep, Q, loss: as `refit` left them.
            m: width of N:M groups, within which moves must stay; 0 if unstructured.
            share: of a row's columns that move.

        Returns:
            keep, Q and loss after the move.
        """
        columns = keep.shape[1]
        count = round(share * columns)
        if count == 0:
            return keep, Q, loss
        grow = (self.gradient(Q).square() / self.diagonal).masked_fill(keep, -torch.inf)
        drop = (Q.square() * self.diagonal).masked_fill(~keep, torch.inf)
        come, go, valid = _moves(grow, drop, m or columns, count)
        moved = keep.clone()
        moved.scatter_(1, come, moved.gather(1, come) | valid)
        moved.scatter_(1, go, moved.gather(1, go) & ~valid)
        refitted, lower = self.refit(moved, Q * moved)
        better = lower < loss
        pick = better[:, None]
        return torch.where(pick, moved, keep), torch.where(pick, refitted, Q), torch.where(better, lower, loss)


def _moves(grow: Tensor, drop: Tensor, m: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best exchanges of each row, each within ``m`` consecutive columns.

    Returns:
        (out, count) columns that come back, columns that go, and whether the exchange is possible.
    """
    rows, columns = grow.shape
    if m == columns:
        most, come = grow.topk(min(count, columns), dim=1)
        least, go = drop.topk(min(count, columns), dim=1, largest=False)
        return come, go, torch.isfinite(most) & torch.isfinite(least)
    most, come = grow.view(rows, -1, m).max(2)
    least, go = drop.view(rows, -1, m).min(2)
    _, groups = (most - least).topk(min(count, columns // m), dim=1)
    valid = (torch.isfinite(most) & torch.isfinite(least)).gather(1, groups)
    return groups * m + come.gather(1, groups), groups * m + go.gather(1, groups), valid
