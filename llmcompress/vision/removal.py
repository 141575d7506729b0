"""Whole channels leave a network: scored, counted, made up for and removed, in one round or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision.budget import LatencyBudget, lowest
from llmcompress.vision.channels import ChannelOptions, remove_checked, spaces
from llmcompress.vision.graph import ChannelGraph, channel_graph
from llmcompress.vision.images import Images
from llmcompress.vision.importance import unit_scores
from llmcompress.vision.recipe import VisionRecipe
from llmcompress.vision.reconstruct import readers
from llmcompress.vision.walk import LayerWalk

#: of the least squares of a repair, as a share of the mean of the Gram matrix's diagonal
DAMPING = 1e-4


@dataclass
class Removed:
    """What went.

    Attributes:
        channels: of each space its name, layers, and channels before and after.
        error: largest relative difference of the smaller network and the one with those channels zeroed.
        latency: target, predicted, measured; empty without a budget of latency.
        warnings: what fell short.
    """

    channels: list[dict[str, Any]]
    error: float
    latency: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def remove_channels(
    module: nn.Module, wanted: ChannelOptions, images: Images, probe: Tensor, targets: Callable[[str], bool], seed: int,
    budget: LatencyBudget | None = None,
) -> Removed:  # fmt: skip
    """Makes a network smaller, in place.

    Args:
        module: in evaluation mode.
        images: that importances and repairs are calibrated on.
        probe: (N, C, H, W) images on which removal is compared with zeroing.
        targets: whether a layer may lose channels; a space goes only if all its layers may.
        budget: of latency, where the options ask for one.

    Raises:
        UserError: nothing can go, or not as much.
    """
    graph = channel_graph(module, images.pixels[:2])
    first = {s.name: s for s in spaces(module, graph) if all(map(targets, s.layers))}
    if not first:
        raise UserError("no channels can go", type(module).__name__, "use another recipe")
    worst = 0.0
    for number in range(1, wanted.rounds + 1):
        share = (1 - wanted.ratio) ** (number / wanted.rounds)
        found = [s for s in spaces(module, graph) if s.name in first]
        scores = unit_scores(module, graph, found, wanted.importance, images, seed)
        if budget is None:
            kept = [min(first[s.name].kept(share, wanted.multiple), len(s.units)) for s in found]
        else:
            kept = budget.choose(module, graph, found, scores, share)
        gone = lowest(found, scores, kept)
        if wanted.repair:
            repair(module, graph, gone, images)
        graph, error = remove_checked(module, graph, gone, probe)
        worst = max(worst, error)
    left = {s.name: s for s in spaces(module, graph)}
    channels = [
        {"name": n, "layers": list(s.layers), "before": s.channels, "after": left[n].channels}
        for n, s in first.items()
    ]  # fmt: skip
    if budget is None:
        return Removed(channels, worst)
    return Removed(channels, worst, budget.report, budget.warnings)


def repair(module: nn.Module, graph: ChannelGraph, gone: Tensor, images: Images) -> None:
    """Solves the layers that read units for what they gave out before, in place and in the order of execution.

    Each meets what comes from repaired layers before it, without these units, and aims at the outputs it had: a mask of
    whole columns, and the step that fits what masks keep.

    Args:
        gone: (n,) labels; what reads them becomes zero.
    """
    masks = {}
    for name, labels in readers(graph).items():
        keep = ~torch.isin(labels, gone)
        if not bool(keep.all()):
            weight = module.get_parameter(f"{name}.weight")
            masks[name] = keep.view(1, -1, *[1] * (weight.dim() - 2)).expand_as(weight).contiguous()
    if not masks:
        return
    step = {"prune": {"method": "refit", "target": "dense", "damping": DAMPING}}
    tree = {"stages": [step], "targets": {"include": sorted(masks)}, "batchnorm": "keep", "bias_correction": False}
    for _ in LayerWalk(module, images.batches(), VisionRecipe.from_tree(tree, "repair"), masks=masks).run():
        pass
