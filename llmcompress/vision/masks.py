"""Masks decided over the whole network: at once, or while it is trained.

A gradual schedule (Zhu & Gupta, 2017, arXiv:1710.01878) raises the sparsity along s·(1 − (1 − p)³), an iterative one
(Han et al., 2015, arXiv:1506.02626) prunes the same share of what is left each time, 1 − (1 − s)^p, and trains in
between; p goes from 1/rounds to 1. What was pruned stays so: it is zero and has the lowest score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.vision.images import Images
from llmcompress.vision.importance import score_masks


@dataclass(frozen=True)
class ScoreOptions:
    """A mask decided over the whole network before the walk.

    Attributes:
        sparsity: a ratio, or N:M.
        score: ``magnitude`` |w|, ``snip`` |w·g|, ``taylor`` (w·g)², ``obd`` ½ E[g²] w², g from a labelled batch.
        scope: weights are compared within the whole network, or within each ``layer``.
        schedule: all at ``once``; or ``gradual`` or ``iterative`` in a training.
        rounds: of a schedule.
        ends: share of the training after which the mask stays as it is.
    """

    sparsity: Sparsity
    score: Literal["magnitude", "snip", "taylor", "obd"] = "magnitude"
    scope: Literal["global", "layer"] = "global"
    schedule: Literal["once", "gradual", "iterative"] = "once"
    rounds: int = 16
    ends: float = 0.75

    def __post_init__(self) -> None:
        if self.sparsity.m and self.scope == "global":
            raise UserError(f"{self.sparsity} is the same everywhere", "scores.scope", "use scope: layer")
        if self.sparsity.m and self.schedule != "once":
            raise UserError(f"{self.sparsity} cannot grow", "scores.schedule", "use a ratio, or schedule: once")
        if self.rounds < 1:
            raise UserError(f"{self.rounds} is not positive", "scores.rounds", "use 1 or more")
        if not 0 < self.ends <= 1:
            raise UserError(f"{self.ends:g} is outside (0, 1]", "scores.ends", "write a share such as 0.75")

    def ratio_at(self, share: float) -> float:
        """The sparsity when ``share`` of the training is done."""
        if self.schedule == "once":
            return self.sparsity.ratio
        number = min(int(share / self.ends * self.rounds) + 1, self.rounds)
        if number == self.rounds:
            return self.sparsity.ratio
        p = number / self.rounds
        if self.schedule == "gradual":
            return self.sparsity.ratio * (1 - (1 - p) ** 3)
        return 1 - (1 - self.sparsity.ratio) ** p


class GrowingMasks:
    """The masks of a network that is trained; told how far the training is, it prunes and keeps zero what is pruned.

    Args:
        module: of which weights are zeroed in place.
        targets: names of the layers.
        options: with a schedule.
        images: with labels, for scores from gradients.

    Attributes:
        masks: by layer name, of the weight's shape.
        ratios: that were taken, one after the other.
    """

    def __init__(self, module: nn.Module, targets: list[str], options: ScoreOptions, images: Images) -> None:
        self.module, self.targets, self.options, self.images = module, targets, options, images
        self.masks: dict[str, Tensor] = {}
        self.ratios: list[float] = []

    @torch.no_grad()
    def __call__(self, share: float) -> None:
        """Called before the first and after each step."""
        self._zero()
        ratio = self.options.ratio_at(share)
        if self.ratios and ratio == self.ratios[-1]:
            return
        was = self.module.training
        self.module.eval()
        o = self.options
        self.masks = score_masks(
            self.module, self.targets, replace(o.sparsity, ratio=ratio), o.score, o.scope, self.images
        )
        self.module.requires_grad_(was).train(was)  # scores from gradients leave it without
        self.ratios.append(ratio)
        self._zero()

    def _zero(self) -> None:
        for name, mask in self.masks.items():
            self.module.get_parameter(f"{name}.weight").data.mul_(mask)
