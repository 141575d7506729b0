"""How much a channel matters, and which weights do: from magnitudes, norms, zeros, or gradients on labelled images.

What the removal of a channel does to the layers that read it is in `llmcompress.vision.reconstruct`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.vision.channels import Space
from llmcompress.vision.graph import ChannelGraph
from llmcompress.vision.images import Images
from llmcompress.vision.network import logits
from llmcompress.vision.reconstruct import readers, reconstruction_scores, watched

_BATCH = 64


def batch_gradients(module: nn.Module, images: Images) -> Iterator[dict[str, Tensor]]:
    """The gradient of the mean loss of each micro-batch, by parameter name; parameters without one are left out.

    Raises:
        UserError: the images have no labels.
    """
    if images.labels is None:
        raise UserError("gradients need labels, and the images have none", "--data", "choose a score without gradients")
    parameters = dict(module.named_parameters())
    for x, y in zip(images.batches(_BATCH), images.labels.split(_BATCH), strict=True):
        module.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = F.cross_entropy(logits(module, x), y)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        finally:
            module.requires_grad_(False)
        yield {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def gradients(module: nn.Module, images: Images) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By parameter name: the mean over micro-batches of the gradient of the loss, and of its square.

    Raises:
        UserError: the images have no labels.
    """
    mean = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    parts = -(-len(images) // _BATCH)
    for found in batch_gradients(module, images):
        for name, g in found.items():
            mean[name] += g / parts
            squares[name] += g.square() / parts
    return mean, squares


def unit_scores(
    module: nn.Module, graph: ChannelGraph, found: list[Space], importance: str, images: Images, seed: int
) -> list[Tensor]:
    """(units,) of each space; higher matters more.

    ``l1`` and ``l2`` are norms of what writes a channel, ``bn`` sums |γ| (Liu et al., 2017, arXiv:1708.06519),
    ``taylor`` is the mean over micro-batches of (Σ w·g)² over its weights (Molchanov et al., 2019, arXiv:1906.10771)
    and ``taylor_bn`` the same over its norm's γ and β, ``apoz`` the share of entries that are not zero (Hu et al.,
    2016, arXiv:1607.03250), ``thinet`` and ``lasso`` say what the layers that read a channel lose.

    Raises:
        UserError: nothing in the network tells such channels apart, or there are no labels for gradients.
    """
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(space.units), generator=generator) for space in found]
    if importance in ("thinet", "lasso"):
        return reconstruction_scores(module, graph, [space.units for space in found], importance, images)
    if importance == "apoz":
        totals = _share_of_nonzeros(module, graph, images)
    elif importance.startswith("taylor"):
        totals = {}
        for gradient in batch_gradients(module, images):
            for unit, total in _sums(module, graph, importance, gradient).items():
                totals[unit] = totals.get(unit, 0.0) + total**2
    else:
        totals = _sums(module, graph, importance, {})
    if importance.endswith("bn") and not totals:
        raise UserError("no BatchNorm scales the channels", "channels.importance", "use taylor or l2")
    return [torch.tensor([totals.get(unit, 0.0) for unit in space.units.tolist()]) for space in found]


def _sums(module: nn.Module, graph: ChannelGraph, importance: str, gradient: dict[str, Tensor]) -> dict[int, float]:
    """Σ |w|, Σ w² or Σ w·g of every unit over the weights that an importance looks at."""
    state, totals = dict(module.named_parameters()), dict[int, float]()
    for use in graph.uses:
        if use.name not in state or not _counts(module, use.name, use.role, importance):
            continue
        value = state[use.name].detach().float()
        if importance in ("l1", "bn"):
            entry = value.abs()
        elif importance == "l2":
            entry = value.square()
        else:
            entry = value * gradient.get(use.name, torch.zeros_like(value))
        lines = entry.movedim(use.axis, 0).flatten(1).sum(1) if entry.dim() > 1 else entry
        for label, line in zip(use.labels.tolist(), lines.tolist(), strict=True):
            totals[label] = totals.get(label, 0.0) + line
    return totals


def _share_of_nonzeros(module: nn.Module, graph: ChannelGraph, images: Images) -> dict[int, float]:
    """Of the entries that the layers reading a unit are given: after the nonlinearity, and after pooling if any."""
    labels = readers(graph)
    seen: dict[int, int] = {}
    full: dict[int, int] = {}
    zeros = 0
    for name, x in watched(module, labels, images):
        nonzero = (x != 0).movedim(-3 if x.dim() == 4 else -1, 0).flatten(1)
        zeros += int((~nonzero).sum())
        for unit, count in zip(labels[name].tolist(), nonzero.sum(1).tolist(), strict=True):
            seen[unit] = seen.get(unit, 0) + nonzero.shape[1]
            full[unit] = full.get(unit, 0) + count
    if not zeros:
        raise UserError("no activation is ever zero", "channels.importance", "use l2 or taylor")
    return {unit: full[unit] / count for unit, count in seen.items()}


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
