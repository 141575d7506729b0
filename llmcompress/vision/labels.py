"""Classes of channels: every entry of a tensor bears a label, and labels that must go together are united."""

from __future__ import annotations

import torch
from torch import Tensor

#: of constants, which go with anything; and of what cannot go
FREE, FROZEN = 0, 1


class Labels:
    """Union-find over labels."""

    def __init__(self) -> None:
        self._parent = [FREE, FROZEN]

    def fresh(self, count: int) -> Tensor:
        """(count,) labels that nothing bears yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """The label that stands for this one's class; FROZEN stands for all that cannot go."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """`root` of each."""
        distinct, place = labels.unique(return_inverse=True)
        return torch.tensor([self.root(int(label)) for label in distinct], dtype=torch.int64)[place]

    def unite(self, one: Tensor, other: Tensor) -> None:
        """What two tensors of one shape bear at the same place goes together; FREE unites nothing."""
        both = (one != FREE) & (other != FREE) & (one != other)
        pairs = torch.stack([one[both], other[both]], 1)
        for a, b in pairs.unique(dim=0).tolist() if len(pairs) else ():
            low, high = sorted((self.root(a), self.root(b)))
            self._parent[high] = low  # FROZEN is the lowest

    def freeze(self, labels: Tensor) -> None:
        """These cannot go."""
        self.unite(labels, torch.full_like(labels, FROZEN))


def varying(labels: Tensor) -> list[int]:
    """Axes along which labels differ."""
    return [a for a in range(labels.dim()) if labels.shape[a] > 1 and bool((labels != labels.narrow(a, 0, 1)).any())]


def along(labels: Tensor, axis: int) -> Tensor | None:
    """The labels of one axis, (n,); None if they differ along another."""
    axis %= labels.dim()
    if any(a != axis for a in varying(labels)):
        return None
    for a in range(labels.dim()):
        if a != axis:
            labels = labels.narrow(a, 0, 1)
    return labels.flatten()
