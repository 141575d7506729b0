"""Groups of weights that leave a network together, and which of them go.

A group is a key-value head with the query heads that read it, or a channel of the MLP: rows of the matrices that write
it and columns of the matrix that reads it. Every block loses as many, since ``config.json`` has one width for all of
them, but each block its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats


@dataclass(frozen=True)
class GroupKind:
    """One kind of group, the same in every block.

    Attributes:
        name: for the report, e.g. ``MLP channels``.
        count: groups in each block.
        weights: that one group holds in the matrices of its block.
        kept_counts: numbers of groups a block may be left with, ascending; the last is ``count``.
        fine: whether groups are single channels, of which a hardware-friendly multiple is kept.
    """

    name: str
    count: int
    weights: int
    kept_counts: Sequence[int]
    fine: bool


@dataclass(frozen=True)
class Kept:
    """What stays of one kind of group.

    Attributes:
        kind: which.
        groups: (blocks, kept) int64, ascending in each row.
    """

    kind: GroupKind
    groups: Tensor

    @property
    def removed_weights(self) -> int:
        """Of one block."""
        return (self.kind.count - self.groups.shape[1]) * self.kind.weights


def lowest_cost(scores: Tensor) -> Tensor:
    """Σ over blocks of the ``n`` lowest scores, for every n.

    Args:
        scores: (blocks, groups).

    Returns:
        (groups + 1,) float64.
    """
    ascending = scores.double().sort(dim=1).values.cumsum(1).sum(0)
    return torch.cat([ascending.new_zeros(1), ascending])


def keep_highest(scores: Tensor, kept: int) -> Tensor:
    """Numbers of the groups with the highest scores of each block, ascending; of equal ones the later stay.

    Args:
        scores: (blocks, groups).
        kept: how many stay in each.

    Returns:
        (blocks, kept) int64.
    """
    order = scores.argsort(dim=1, stable=True)
    return order[:, scores.shape[1] - kept :].sort(dim=1).values


class StructuredMethod(Method):
    """A step that makes the matrices of a whole model smaller before the walk over its blocks begins.

    Attributes:
        sparsity: share of the weights of the blocks' matrices that goes.
        samples, length: of the calibration rows, how many and how much of each the gradients are taken on.
    """

    stage = "prune"
    sparsity: float
    samples: int
    length: int

    @property
    def needs_squares(self) -> bool:
        """Whether `saliency` reads squared gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define needs_squares")

    def saliency(self, weight: Tensor, gradient: Tensor, squares: Tensor | None, axis: int) -> Tensor:
        """Importance of each row (``axis`` 0) or column (1) of a matrix (out, in); of each entry of a bias (out, 1).

        Args:
            weight: float32.
            gradient: of the mean loss over the sequences, float32.
            squares: mean over the sequences of their squared gradients; None unless `needs_squares`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define saliency")

    def choose(self, kinds: Sequence[GroupKind], scores: Sequence[Tensor], total: int) -> list[Kept]:
        """Which groups stay.

        Args:
            kinds: of groups.
            scores: (blocks, groups) float32 of each kind.
            total: weights of all matrices of one block.

        Raises:
            UserError: the target cannot be met.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose")

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        raise TypeError(f"{type(self).__name__} changes whole models, not the matrices of one input")
