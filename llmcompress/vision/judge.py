"""What a network is worth on images, and what it costs: accuracy, multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.vision.images import Images
from llmcompress.vision.network import logits

#: images judged at once
BATCH = 128


@torch.no_grad()
def all_logits(module: nn.Module, images: Images) -> Tensor:
    """(N, classes)."""
    return torch.cat([logits(module, x) for x in images.batches(BATCH)])


def accuracy(found: Tensor, labels: Tensor | None) -> float | None:
    """Share of (N, classes) logits whose largest is the label's; None without labels."""
    return None if labels is None else float((found.argmax(1) == labels).float().mean())


@torch.no_grad()
def multiplications(module: nn.Module, x: Tensor) -> int:
    """Of the convolutions and Linears, for the first image of ``x``."""
    total = 0

    def count(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        positions = output.numel() // layer.weight.shape[0]
        total += positions * layer.weight.numel()

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        logits(module, x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return total
