"""What a network is worth on images, and what it costs: accuracy, agreement, multiplications, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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


@torch.no_grad()
def latencies(calls: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Milliseconds of each call: the median over rounds in which the calls take turns, after a round to warm up."""
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for number, call in enumerate(calls):
            began = time.perf_counter()
            call()
            found[number].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(times) for times in found]
