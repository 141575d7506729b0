"""What makes up for removed channels: BatchNorm statistics taken anew, and a short training that follows the dense
network (distillation: Hinton et al., 2015, arXiv:1503.02531)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llmcompress.vision.images import Images
from llmcompress.vision.network import logits

RATE, BATCH = 2e-3, 64


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


def recover(module: nn.Module, dense: nn.Module, images: Images, epochs: int, seed: int) -> dict[str, Any]:
    """Trains a smaller network in place to say what the dense one says; returns the losses by epoch.

    Args:
        module, dense: take the same images.
        images: all that may be learnt from; labels are not read.
    """
    parts = -(-len(images) // BATCH)
    generator = torch.Generator().manual_seed(seed)
    module.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * parts)
    losses = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(images), generator=generator).split(BATCH):
                if len(rows) < 2:
                    continue
                x = images.pixels[rows]
                with torch.no_grad():
                    aim = logits(dense, x).log_softmax(1)
                loss = F.kl_div(logits(module, x).log_softmax(1), aim, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) / parts
            losses.append(total)
    module.requires_grad_(False).eval()
    return {"epochs": epochs, "images": len(images), "rate": RATE, "divergence": losses}
