"""What makes up for what was lost: BatchNorm statistics taken anew, and a short training that follows the labels, the
dense network (distillation: Hinton et al., 2015, arXiv:1503.02531), or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.errors import UserError
from llmcompress.vision.images import Images
from llmcompress.vision.network import logits

BATCH = 64


@dataclass(frozen=True)
class TuneOptions:
    """How the network is trained: after channels went, while masks grow, and at the end with its masks and grids held.

    Attributes:
        epochs: of each of these.
        learn: ``distillation`` follows the dense network, ``labels`` the images' own, ``both`` the mean of the two.
        rate: the highest learning rate, of AdamW in one cycle.
        soft: before channels go, an epoch after the other, their filters are zeroed and may grow back.
    """

    epochs: int = 3
    learn: Literal["distillation", "labels", "both"] = "distillation"
    rate: float = 2e-3
    soft: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"{self.epochs} epochs", "tune.epochs", "use 1 or more")
        if not 0 < self.rate < float("inf"):
            raise UserError(f"{self.rate:g} is no learning rate", "tune.rate", "use a positive number such as 0.002")


@torch.no_grad()
def reestimate(module: nn.Module, images: Images) -> int:
    """Takes the means and variances of all BatchNorms anew, as averages over the micro-batches; returns how many."""
    norms = [
        m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x in images.batches(BATCH):
        if len(x) > 1:
            logits(module, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(norms)


def train(
    module: nn.Module, dense: nn.Module, images: Images, options: TuneOptions, seed: int, *, renew: bool = True,
    at: Callable[[float], None] | None = None, each_epoch: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains a network in place; the same seed gives the same weights.

    Args:
        module: to be trained, all its parameters.
        dense: takes the same images; stays as it is.
        images: all that may be learnt from.
        options: see there.
        seed: of the order of the images, and of what the network draws.
        renew: BatchNorms take statistics of what they see; otherwise they keep them, and dropout is off.
        at: told the share of the training that is done, from 0 at its beginning to 1.
        each_epoch: called after each.

    Returns:
        What the report tells of it, with the mean loss of each epoch.

    Raises:
        UserError: there are labels to learn, and the images have none.
    """
    if options.learn != "distillation" and images.labels is None:
        raise UserError("the images have none", f"tune.learn={options.learn}", "use learn=distillation")
    batches = [rows for rows in torch.arange(len(images)).split(BATCH) if len(rows) > 1]
    total, done, losses = options.epochs * len(batches), 0, []
    generator = torch.Generator().manual_seed(seed)
    module.requires_grad_(True).train(renew)
    optimizer = torch.optim.AdamW(module.parameters(), options.rate, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=total)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        told = at or (lambda share: None)
        told(0.0)
        for _ in range(options.epochs):
            order, loss_sum = torch.randperm(len(images), generator=generator), 0.0
            for rows in batches:
                loss = _loss(module, dense, images.take(order[rows]), options.learn)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                done += 1
                told(done / total)
                loss_sum += float(loss.detach()) / len(batches)
            losses.append(loss_sum)
            if each_epoch is not None:
                each_epoch()
    module.requires_grad_(False).eval()
    return {"epochs": options.epochs, "images": len(images), "learn": options.learn, "rate": options.rate,
            "loss": losses}  # fmt: skip


def _loss(module: nn.Module, dense: nn.Module, images: Images, learn: str) -> Tensor:
    """Cross entropy, Kullback-Leibler divergence from the dense network, or their mean."""
    found, parts = logits(module, images.pixels), []
    if learn != "labels":
        with torch.no_grad():
            aim = logits(dense, images.pixels).log_softmax(1)
        parts.append(F.kl_div(found.log_softmax(1), aim, log_target=True, reduction="batchmean"))
    if learn != "distillation":
        assert images.labels is not None
        parts.append(F.cross_entropy(found, images.labels))
    return torch.stack(parts).mean()
