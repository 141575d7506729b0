"""Channels by what the layers that read them lose, and the least-squares repair of those layers.

A channel j adds X_j W_jᵀ to the outputs of a layer. The Gram matrix of these parts over all outputs and positions is

    G_jk = ⟨X_j W_jᵀ, X_k W_kᵀ⟩ = Σ_ab (XᵀX ∘ WᵀW)_ab,  a among the columns of j, b among those of k,

so that ‖Σ_j∈T X_j W_jᵀ‖² = 1ᵀ G_TT 1 is known for every set T of channels.

- ThiNet (Luo et al., 2017, arXiv:1707.06342): T grows by the channel that adds least to it.
- Channel selection by LASSO (He et al., 2017, arXiv:1707.06168): min_β ½‖Y − Σ_j β_j X_j W_jᵀ / ‖W_j‖‖² + λ‖β‖₁ with
  Y the layer's outputs; channels that enter as λ falls stay.

Departures: all outputs count, not a sample; the layers that read one channel count together, each relative to the
energy of its outputs; all spaces are decided on the inputs of one network, and repaired in the order of execution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmcompress.core.stats import InputStats
from llmcompress.model.matrix import MatrixView
from llmcompress.vision.graph import ChannelGraph
from llmcompress.vision.images import Images
from llmcompress.vision.network import logits

#: λ falls by this factor, so many times, from where the first channel enters
FALL, STEPS = 0.85, 60
#: sweeps over the coordinates at each λ, at most, and the relative change that ends them
SWEEPS, SETTLED = 200, 1e-6
_BATCH, _MOST_ROWS = 64, 1 << 14


def readers(graph: ChannelGraph) -> dict[str, Tensor]:
    """Labels of the inputs of every layer that mixes channels, (inputs,), by its name."""
    return {use.name.removesuffix(".weight"): use.labels for use in graph.uses if use.role == "reads"}


@torch.no_grad()
def watched(module: nn.Module, names: Mapping[str, object], images: Images) -> Iterator[tuple[str, Tensor]]:
    """Name and input of each call of some layers, micro-batch by micro-batch."""
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name in names
    ]
    try:
        for x in images.batches(_BATCH):
            logits(module, x)
            yield from seen
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()


def reconstruction_scores(
    module: nn.Module, graph: ChannelGraph, units: Sequence[Tensor], importance: str, images: Images
) -> list[Tensor]:
    """(units,) of each space, by ``thinet`` or ``lasso``; higher stays longer. They rank a space alone.

    Args:
        units: (n,) labels of each space.
    """
    found = _parts(module, graph, units, images)
    return [removal_order(G) if importance == "thinet" else entry_order(G, norms) for G, norms in found]


def removal_order(G: Tensor) -> Tensor:
    """(n,) when a channel leaves, 0 the first: each is the one that adds least to 1ᵀ G_TT 1.

    Args:
        G: (n, n) float64.
    """
    added, order = G.diagonal().clone(), torch.zeros(len(G))
    for number in range(len(G)):
        j = int(added.argmin())
        order[j] = number
        added += 2 * G[j]
        added[j] = torch.inf
    return order


def lasso(G: Tensor, q: Tensor, penalty: float, start: Tensor) -> Tensor:
    """The β of least ½βᵀGβ − qᵀβ + λ‖β‖₁, by coordinate descent.

    Args:
        G: (n, n) float64, positive semidefinite.
        q, start: (n,) float64.
        penalty: λ.
    """
    full, beta = G.numpy(), start.numpy().copy()
    gradient = q.numpy() - full @ beta
    for _ in range(SWEEPS):
        largest = 0.0
        for j, curved in enumerate(full.diagonal()):
            if curved <= 0:
                continue
            pull = gradient[j] + curved * beta[j]
            move = max(abs(pull) - penalty, 0.0) / curved * (1 if pull > 0 else -1) - beta[j]
            if move:
                gradient -= full[j] * move
                beta[j] += move
                largest = max(largest, abs(move))
        if largest <= SETTLED * abs(beta).max():
            break
    return torch.from_numpy(beta)


def entry_order(G: Tensor, norms: Tensor) -> Tensor:
    """(n,) the largest λ of the path at which a channel has a share; of those that enter together, by that share.

    Args:
        G: (n, n) float64.
        norms: (n,) ‖W_j‖ float64.
    """
    norms = norms.clamp(min=1e-30)
    scaled, q = G / norms / norms[:, None], G.sum(1) / norms
    penalty, beta, order = float(q.abs().max()), torch.zeros_like(q), torch.zeros_like(q)
    for _ in range(STEPS):
        penalty *= FALL
        beta = lasso(scaled, q, penalty, beta)
        share = beta.abs() / beta.abs().max().clamp(min=1e-30)
        entered = (order == 0) & (beta != 0)
        order = torch.where(entered, penalty * (1 + (1 / FALL - 1) * share), order)
        if bool((order > 0).all()):
            break
    return order.float()


def _parts(
    module: nn.Module, graph: ChannelGraph, units: Sequence[Tensor], images: Images
) -> list[tuple[Tensor, Tensor]]:
    """Of each space G (n, n) over all its readers, and the norms of W_j (n,), float64."""
    labels = readers(graph)
    stats: dict[str, InputStats] = {}
    for name, x in watched(module, labels, images):
        view = MatrixView(name, module.get_submodule(name))
        rows = view.rows(x)
        rows = rows[:: max(1, len(rows) * -(-len(images) // _BATCH) // _MOST_ROWS)]
        stats.setdefault(name, InputStats(view.shape[1], {"gram"})).update(rows)
    place = {unit: (s, n) for s, space in enumerate(units) for n, unit in enumerate(space.tolist())}
    found = [(torch.zeros(len(u), len(u)).double(), torch.zeros(len(u)).double()) for u in units]
    for name, seen in stats.items():
        W = MatrixView(name, module.get_submodule(name)).read().double()
        both = seen.gram.double() * (W.T @ W)
        energy = float(both.sum())
        if energy <= 0:
            continue
        width = W.shape[1] // len(labels[name])
        owner = [place.get(label, (-1, 0)) for label in labels[name].tolist() for _ in range(width)]
        for s in {s for s, _ in owner} - {-1}:
            columns = torch.tensor([c for c, (o, _) in enumerate(owner) if o == s])
            rank = torch.tensor([owner[c][1] for c in columns.tolist()])
            summed = torch.zeros(len(units[s]), len(columns)).double().index_add_(0, rank, both[columns][:, columns])
            G, norms = found[s]
            G.index_add_(1, rank, summed / energy)
            norms.index_add_(0, rank, W[:, columns].square().sum(0))
    return [(G, norms.sqrt()) for G, norms in found]
