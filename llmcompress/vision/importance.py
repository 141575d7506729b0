"""How much a channel matters, and which weights do: from magnitudes, norms, or gradients on labelled images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.vision.channels import Space
from llmcompress.vision.graph import ChannelGraph
from llmcompress.vision.images import Images
from llmcompress.vision.network import logits

NEEDS_LABELS = ("taylor", "taylor_bn", "snip", "obd")
_BATCH = 64


def gradients(module: nn.Module, images: Images) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By parameter name: the gradient of the mean loss, and the mean over micro-batches of its square.

    Raises:
        UserError: the images have no labels.
    """
    if images.labels is None:
        raise UserError("gradients need labels, and the images have none", "--data", "choose a score without gradients")
    parameters = dict(module.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    parts = list(zip(images.batches(_BATCH), images.labels.split(_BATCH), strict=True))
    module.requires_grad_(True)
    try:
        with torch.enable_grad():
            for x, y in parts:
                loss = F.cross_entropy(logits(module, x), y)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, g in zip(parameters, found, strict=True):
                    if g is not None:
                        mean[name] += g / len(parts)
                        squares[name] += g.square() / len(parts)
    finally:
        module.requires_grad_(False)
    return mean, squares


def unit_scores(
    module: nn.Module, graph: ChannelGraph, found: list[Space], importance: str, images: Images, seed: int
) -> list[Tensor]:
    """(units,) of each space; higher matters more.

    ``l1`` and ``l2`` are norms of what writes a channel, ``bn`` sums |γ|, ``taylor`` is (Σ w·g)² over its weights
    (Molchanov et al., 2019, arXiv:1906.10771) and ``taylor_bn`` the same over its norm's γ and β.
    """
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(space.units), generator=generator) for space in found]
    state = module.state_dict()
    gradient = gradients(module, images)[0] if importance in NEEDS_LABELS else {}
    totals: dict[int, float] = {}
    for use in graph.uses:
        if use.name not in state or not _counts(module, use.name, use.role, importance):
            continue
        value = state[use.name].float()
        if importance in ("l1", "bn"):
            entry = value.abs()
        elif importance == "l2":
            entry = value.square()
        else:
            entry = value * gradient.get(use.name, torch.zeros_like(value))
        lines = entry.movedim(use.axis, 0).flatten(1).sum(1) if entry.dim() > 1 else entry
        for label, line in zip(use.labels.tolist(), lines.tolist(), strict=True):
            totals[label] = totals.get(label, 0.0) + line
    if importance == "bn" and not totals:
        raise UserError("no BatchNorm scales the channels", "channels.importance", "use l2 or taylor")
    power = 2 if importance.startswith("taylor") else 1
    return [torch.tensor([totals.get(unit, 0.0) ** power for unit in space.units.tolist()]) for space in found]


def _counts(module: nn.Module, name: str, role: str, importance: str) -> bool:
    """Whether an importance looks at a use."""
    owner, _, attribute = name.rpartition(".")
    norm = isinstance(module.get_submodule(owner), nn.BatchNorm2d | nn.BatchNorm1d)
    if importance == "bn":
        return norm and attribute == "weight"
    if importance == "taylor_bn":
        return norm and attribute in ("weight", "bias")
    return role == "writes" and attribute == "weight"


def score_masks(
    module: nn.Module, targets: list[str], sparsity: Sparsity, score: str, scope: str, images: Images
) -> dict[str, Tensor]:
    """Masks by layer name, of the weight's shape, with exact counts.

    Args:
        targets: names of the layers.
        score: ``magnitude`` |w|, ``snip`` |w·g| (Lee et al., 2019), ``taylor`` (w·g)², ``obd`` ½ E[g²] w².
        scope: ``global`` or ``layer``.
    """
    mean, squares = gradients(module, images) if score != "magnitude" else ({}, {})
    scores = {}
    for name in targets:
        key = f"{name}.weight"
        w = module.get_parameter(key).detach()
        if score == "magnitude":
            scores[name] = w.abs()
        elif score == "obd":
            scores[name] = 0.5 * squares[key] * w.square()
        else:
            scores[name] = (w * mean[key]).abs() if score == "snip" else (w * mean[key]).square()
    if sparsity.m:
        return {
            n: sparsity.keep_mask(s.flatten(1)).view_as(s)
            for n, s in scores.items()
            if not sparsity.misfit(s[0].numel())
        }
    if scope == "layer":
        return {n: sparsity.keep_mask(s.view(1, -1)).view_as(s) for n, s in scores.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])[None]
    parts = sparsity.keep_mask(flat)[0].split([s.numel() for s in scores.values()])
    return {n: part.view_as(s) for (n, s), part in zip(scores.items(), parts, strict=True)}
