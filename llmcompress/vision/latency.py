"""Latency measured on the machine the program runs on: of layers by their shapes, and of networks, in turns.

The least of many turns counts: whatever else the machine does only adds to it, and unevenly. On one thread it is the
thread's processor time, to which others add nothing but misses of the cache. Every figure is kept, so that another run
with the same table decides the same."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.errors import UserError
from llmcompress.vision.network import logits

#: repetitions of every layer and of networks that are compared; of layers no fewer than some, but within seconds
LAYER_TURNS, NETWORK_TURNS = 25, 50
FEWEST_TURNS, PATIENCE = 5, 30.0


@dataclass(frozen=True)
class Shape:
    """What the latency of one call of a layer depends on.

    Attributes:
        images: at once.
        inputs, outputs: channels.
        size: of the input, (H, W); of a Linear all positions of one image.
        window: kernel, stride, padding, dilation of a convolution; empty for a Linear.
        groups: of a convolution.
    """

    images: int
    inputs: int
    outputs: int
    size: tuple[int, ...]
    window: tuple[tuple[int, ...], ...] = ()
    groups: int = 1

    @staticmethod
    def of(layer: nn.Module, x: Tensor) -> Shape:
        """That of a Conv2d or Linear that is given ``x``."""
        if isinstance(layer, nn.Conv2d):
            padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
            window = (layer.kernel_size, layer.stride, padding, layer.dilation)
            return Shape(len(x), layer.in_channels, layer.out_channels, tuple(x.shape[2:]), window, layer.groups)
        assert isinstance(layer, nn.Linear)
        return Shape(len(x), layer.in_features, layer.out_features, (x[0].numel() // x.shape[-1],))

    def call(self, values: Tensor) -> Callable[[], Tensor]:
        """The layer, its numbers taken from a long vector."""
        if not self.window:
            x = values[: self.images * self.size[0] * self.inputs].view(-1, self.inputs)
            weight = values[: self.outputs * self.inputs].view(self.outputs, self.inputs)
            return lambda: F.linear(x, weight, values[: self.outputs])
        kernel, stride, padding, dilation = self.window
        x = values[: self.images * self.inputs * self.size[0] * self.size[1]].view(self.images, self.inputs, *self.size)
        columns = self.inputs // self.groups
        weight = values[: self.outputs * columns * kernel[0] * kernel[1]].view(self.outputs, columns, *kernel)
        return lambda: F.conv2d(x, weight, values[: self.outputs], stride, padding, dilation, self.groups)

    @property
    def entries(self) -> int:
        """Of the longest tensor that `call` needs."""
        kernel = self.window[0] if self.window else (1, 1)
        positions = self.size[0] * (self.size[1] if self.window else 1)
        return max(self.images * self.inputs * positions, self.outputs * self.inputs * kernel[0] * kernel[1])


@dataclass
class LatencyTable:
    """Seconds by shape, and of networks as a share of another's.

    Attributes:
        file: where they are kept; None keeps them in memory alone.
    """

    file: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None or not self.file.exists():
            return
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if stored["machine"] == machine():
                self.seconds = {str(key): float(value) for key, value in stored["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"is no table of latencies ({error})", str(self.file), "delete it") from None

    def save(self) -> None:
        """Writes the file, if there is one."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            tree = {"machine": machine(), "seconds": self.seconds}
            self.file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    def __getitem__(self, shape: Shape) -> float:
        return self.seconds[str(shape)]

    @torch.no_grad()
    def fill(self, shapes: Iterable[Shape]) -> None:
        """Measures what is missing: in turns, in each of which every shape is called once."""
        missing = sorted({shape for shape in shapes if str(shape) not in self.seconds}, key=str)
        if not missing:
            return
        values = torch.rand(max(shape.entries for shape in missing)) - 0.5
        calls = [shape.call(values) for shape in missing]
        one = sum(found[0] for found in in_turns(calls, 1))
        turns = min(max(int(PATIENCE / one), FEWEST_TURNS), LAYER_TURNS)
        for shape, found in zip(missing, in_turns(calls, turns), strict=True):
            self.seconds[str(shape)] = min(found)
        self.save()

    @torch.no_grad()
    def networks(self, dense: nn.Module, other: nn.Module, x: Tensor) -> tuple[float, float]:
        """Seconds of a network on ``x``, and the share of them that another takes, both called in every turn."""
        key = f"{_name(other)} of {_name(dense)} on {tuple(x.shape)}"
        if f"{key}: share" not in self.seconds:
            first, second = in_turns([lambda: logits(dense, x), lambda: logits(other, x)], NETWORK_TURNS)
            self.seconds[f"{key}: seconds"] = min(first)
            self.seconds[f"{key}: share"] = min(second) / min(first)
            self.save()
        return self.seconds[f"{key}: seconds"], self.seconds[f"{key}: share"]


def in_turns(calls: Sequence[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Seconds of each call in every turn, after one that does not count: what else the machine does falls on all."""
    found: list[list[float]] = [[] for _ in calls]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(turns + 1):
        for call, seconds in zip(calls, found, strict=True):
            began = clock()
            call()
            seconds.append(clock() - began)
    return [seconds[1:] for seconds in found]


def machine() -> dict[str, object]:
    """What a latency depends on beside the shape."""
    return {
        "processor": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
    }  # fmt: skip


@torch.no_grad()
def layer_calls(module: nn.Module, x: Tensor) -> list[tuple[str, Shape, int]]:
    """Name, shape and entries of the output of each call of a Conv2d or Linear, in the order of execution."""
    found: list[tuple[str, Shape, int]] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, output, name=name: found.append((name, Shape.of(layer, args[0]), output.numel()))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    try:
        logits(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _name(module: nn.Module) -> str:
    """Of a network's shape: layers and their widths."""
    return hashlib.sha256(repr(module).encode()).hexdigest()[:16]
