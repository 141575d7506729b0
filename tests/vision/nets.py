"""Small networks of thirteen kinds, whose channels are coupled in as many ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.vision.networks import InvertedBlock, ResidualBlock, conv_norm


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 3), nn.GELU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(10 * 36, 14), nn.Sigmoid(), nn.Linear(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3)
        self.one, self.two, self.three = conv_norm(16, 6, 1), conv_norm(6, 6, 3, 2), conv_norm(6, 20, 1)
        self.shortcut = conv_norm(16, 20, 1, 2)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.three(F.relu(self.two(F.relu(self.one(x)))))
        y += self.shortcut(x)
        return self.head(F.relu(y).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = torch.cat([x, F.relu(conv(x))], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(3, 12, 1), nn.ReLU(), conv_norm(12, 18, 3, groups=6), nn.ReLU(), nn.Conv2d(18, 8, 1, groups=1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).amax((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.where = nn.Conv2d(12, 1, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        x = x * self.where(x).sigmoid()
        return self.head(x.mean((-1, -2)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = conv_norm(3, 8, 3), conv_norm(8, 12, 3, 2)
        self.up, self.out = nn.Conv2d(20, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down(x))
        low = F.interpolate(F.relu(self.low(high)), scale_factor=2.0, mode="nearest")
        return self.out(F.relu(self.up(torch.cat([high, low], 1)))).mean((2, 3))


class ConvNext(nn.Module):
    """A depthwise convolution, a LayerNorm over channels, two Linears over them, a gain per channel, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.gain, self.head = nn.Parameter(torch.rand(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(self.norm(self.mix(x).permute(0, 2, 3, 1))))) * self.gain
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class TwoBranch(nn.Module):
    """Branches that meet by addition, one of them scaled per channel, and by concatenation; one is cut in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1, bias=False)
        self.gain, self.other = nn.Parameter(torch.rand(12, 1, 1)), nn.Conv2d(3, 6, 5, padding=2)
        self.join, self.head = nn.Conv2d(12, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.left(x) + self.gain * self.right(x))
        first, second = y.chunk(2, 1)
        y = torch.cat([first * second, F.relu6(self.other(x))], 1)
        return self.head(F.hardswish(self.join(y)).mean((2, 3)))


class Padded(nn.Module):
    """Padding and activations by operators of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope, self.second = nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.Conv2d(10, 8, 3, 2)
        self.one, self.head = nn.PReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.first(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        x = self.second(F.pad(self.slope(x), (0, 1, 0, 1)))
        return self.head(F.logsigmoid(self.one(x)).mean((2, 3)))


class Staged(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv_norm(3, 8, 3), nn.Sequential(*blocks), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type="bottleneck", num_labels=5)
    return ResNetForImageClassification(config)


def hf_mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5))


KINDS = {
    "plain": Plain,
    "residual": lambda: Staged(ResidualBlock(8, 8, 1), ResidualBlock(8, 12, 2), ResidualBlock(12, 12, 1), width=12),
    "bottleneck": Bottleneck,
    "dense": Dense,
    "inverted": lambda: Staged(InvertedBlock(8, 8, 1, 3), InvertedBlock(8, 12, 2, 3), width=12),
    "grouped": Grouped,
    "squeeze-excite": SqueezeExcite,
    "u-net": UNet,
    "hf-resnet": hf_resnet,
    "hf-mobilenet-v2": hf_mobilenet,
    "convnext": ConvNext,
    "two-branch": TwoBranch,
    "padded": Padded,
}


def network(kind: str, seed: int = 0) -> nn.Module:
    """With the statistics of norms as of a trained one."""
    torch.manual_seed(seed)
    module = KINDS[kind]().eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 2),
                (layer.weight, 0.5, 2),
                (layer.bias, -1, 1),
            ):
                tensor.data.uniform_(low, high)
    return module


def images(kind: str, count: int = 2) -> Tensor:
    side = 32 if kind.startswith("hf") else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
