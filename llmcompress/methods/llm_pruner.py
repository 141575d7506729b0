"""LLM-Pruner (Ma et al., 2023, arXiv:2305.11627): remove coupled groups of weights, least important first.

A group is a key-value head with its query heads (rows of q, k, v; columns of o) or an MLP channel (rows of gate and up;
a column of down), and its importance is what a Taylor expansion of the language-model loss says its removal costs:

    element   Σ |w g|                  vector   Σ over its rows and columns |Σ w g|
    second    Σ |w² G|                 mixed    Σ |w g − ½ w² G|

with g the gradient of the mean loss over a few sequences and G the mean of the squares of their gradients, which stands
for the diagonal of the Hessian. Sums go over all weights of the group, its biases among them.

Departures: a checkpoint that plain transformers loads has one width for all blocks, so every block loses as many
groups, the first and last ones too, which the paper spares; and how much of the target falls to heads and how much to
channels is chosen by the importance that is lost, not fixed to the same share of both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llmcompress.core.structure import GroupKind, Kept, StructuredMethod, keep_highest, lowest_cost
from llmcompress.errors import UserError


@dataclass(frozen=True)
class LLMPruner(StructuredMethod):
    """Removes the groups that matter least to the loss.

    Attributes:
        sparsity: share of the weights of the blocks' matrices that goes; met as nearly as possible from below.
        multiple: kept channels are rounded up to one of it.
        taylor: the importance.
        samples, length: the gradients are taken on the first ``length`` tokens of at most ``samples`` calibration rows.
    """

    sparsity: float
    multiple: int = 16
    taylor: Literal["element", "vector", "second", "mixed"] = "element"
    samples: int = 10
    length: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity} is not between 0 and 1", "llm_pruner.sparsity", "e.g. 0.2")
        for key, least in (("multiple", 1), ("samples", 1), ("length", 2)):
            if getattr(self, key) < least:
                raise UserError(f"{key} {getattr(self, key)} is below {least}", f"llm_pruner.{key}")

    @property
    def needs_squares(self) -> bool:
        return self.taylor in ("second", "mixed")

    def saliency(self, weight: Tensor, gradient: Tensor, squares: Tensor | None, axis: int) -> Tensor:
        first = weight * gradient
        if self.taylor == "element":
            return first.abs().sum(1 - axis)
        if self.taylor == "vector":
            return first.sum(1 - axis).abs()
        assert squares is not None
        second = weight.square() * squares
        return (second if self.taylor == "second" else (first - second / 2).abs()).sum(1 - axis)

    def choose(self, kinds: Sequence[GroupKind], scores: Sequence[Tensor], total: int) -> list[Kept]:
        """Among the widths that come within one step of the target, those whose removal costs least importance."""
        budget = int(self.sparsity * total)
        widths = [self._widths(kind) for kind in kinds]
        most = sum((kind.count - kept[0]) * kind.weights for kind, kept in zip(kinds, widths, strict=True))
        if budget > most:
            raise UserError(f"at most {most / total:.1%} of the blocks' weights can be removed", "prune.sparsity",
                            f"use at most {int(1000 * most / total) / 1000}")  # fmt: skip
        costs = [lowest_cost(score) for score in scores]
        options = []
        for kept in itertools.product(*widths):
            gone = [kind.count - k for kind, k in zip(kinds, kept, strict=True)]
            weights = sum(n * kind.weights for n, kind in zip(gone, kinds, strict=True))
            if weights <= budget:
                cost = sum(float(c[n]) for c, n in zip(costs, gone, strict=True))
                options.append((weights, cost, kept))
        best = max(weights for weights, _, _ in options)
        if best == 0:
            raise UserError(f"removing {self.sparsity:.1%} is less than the smallest step", "prune.sparsity",
                            "raise it, or lower prune.multiple")  # fmt: skip
        step = min(self._step(kind) for kind in kinds)
        _, _, kept = min((o for o in options if o[0] > best - step), key=lambda option: (option[1], -option[0]))
        return [
            Kept(kind, keep_highest(score, k)) for kind, score, k in zip(kinds, scores, kept, strict=True)
        ]  # fmt: skip

    def _widths(self, kind: GroupKind) -> list[int]:
        return [k for k in kind.kept_counts if not kind.fine or k == kind.count or k % self.multiple == 0]

    def _step(self, kind: GroupKind) -> int:
        return kind.weights * (self.multiple if kind.fine else 1)
