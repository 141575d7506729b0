"""Small networks for small images, built from a few numbers: residual (He et al., 2015, arXiv:1512.03385) and inverted
residual (Sandler et al., 2018, arXiv:1801.04381)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from llmcompress.errors import UserError, nearest


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (over ``stride``), and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride)
        self.second = conv_norm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


class InvertedBlock(nn.Module):
    """Wide in the middle, where it is depthwise; the narrow ends are linear."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand, self.depthwise = conv_norm(inputs, middle, 1), conv_norm(middle, middle, 3, stride, middle)
        self.project = conv_norm(middle, outputs, 1)
        self.relu = nn.ReLU6()
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        y = self.project(self.relu(self.depthwise(self.relu(self.expand(x)))))
        return x + y if self.adds else y


class Classifier(nn.Module):
    """A stem, stages that halve the image, and a linear layer on the mean over positions."""

    def __init__(self, stem: nn.Module, stages: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.stem, self.stages = stem, stages
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, classes)."""
        return self.head(self.pool(self.stages(self.relu(self.stem(x)))).flatten(1))


def _staged(
    block: Callable[[int, int, int], nn.Module], inputs: int, widths: Sequence[int], blocks: int, classes: int
) -> Classifier:
    layers: list[nn.Module] = []
    before = widths[0]
    for number, width in enumerate(widths):
        for index in range(blocks):
            layers.append(block(before, width, 2 if number and not index else 1))
            before = width
    return Classifier(conv_norm(inputs, widths[0], 3), nn.Sequential(*layers), before, classes)


def resnet(inputs: int = 1, widths: Sequence[int] = (16, 32, 64), blocks: int = 2, classes: int = 10) -> Classifier:
    """A residual network; ``blocks`` in each stage of ``widths``."""
    return _staged(ResidualBlock, inputs, widths, blocks, classes)


def mobilenet(
    inputs: int = 1, widths: Sequence[int] = (16, 24, 32), blocks: int = 2, classes: int = 10, expansion: int = 4
) -> Classifier:
    """A network of inverted residuals."""

    def block(before: int, width: int, stride: int) -> nn.Module:
        return InvertedBlock(before, width, stride, expansion)

    return _staged(block, inputs, widths, blocks, classes)


#: name in a folder's description → builder
NETWORKS: dict[str, Callable[..., Classifier]] = {"resnet": resnet, "mobilenet": mobilenet}


def build(name: str, arguments: dict[str, object]) -> nn.Module:
    """The network of a description, its weights random.

    Raises:
        UserError: no such network, or arguments it does not take.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network '{name}'", "network.json", nearest(name, NETWORKS))
    try:
        return NETWORKS[name](**arguments)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"does not describe a {name}: {error}", "network.json", "take the file the program wrote"
        ) from None
