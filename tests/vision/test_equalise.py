"""Equalised ranges: the function stays, channels have one range on both sides, what no factor passes is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llmcompress.vision import VisionRecipe, compress_vision
from llmcompress.vision.equalise import equalise


class Net(nn.Module):
    """A convolution, a depthwise one, one of several outputs each, and a Linear over positions; ranges far apart."""

    def __init__(self, act: nn.Module, shortcut: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.shortcut = act, shortcut
        self.first, self.deep = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, groups=8)
        self.point, self.head = nn.Conv2d(16, 6, 1), nn.Linear(96, 5)
        for layer in (self.first, self.deep, self.point):
            spread = 10 ** torch.linspace(-1, 1, len(layer.weight))
            layer.weight.data *= spread.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.point(self.act(self.deep(self.act(self.first(x))))))
        if self.shortcut:
            y = y + 1.0
        return self.head(y.flatten(1))


def images(seed: int = 0) -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


PAIRS = [("first", "deep"), ("deep", "point"), ("point", "head")]


@torch.no_grad()
def test_the_function_stays_and_channels_have_one_range_on_both_sides() -> None:
    net = Net(nn.ReLU()).eval()
    before = copy.deepcopy(net).double()(images(1).double())
    found = equalise(net, images(), seed=0)
    assert found.pairs == PAIRS and not found.refused
    torch.testing.assert_close(net(images(1)).double(), before, rtol=1e-4, atol=1e-4)
    reads = {
        "first": net.deep.weight.abs().view(8, -1).amax(1),
        "deep": net.point.weight.abs().amax((0, 2, 3)).view(8, 2).amax(1),
        "point": net.head.weight.abs().amax(0).view(6, 16).amax(1),
    }
    for name, range_read in reads.items():
        written = net.get_submodule(name).weight.abs().view(len(range_read), -1).amax(1)
        torch.testing.assert_close(written, range_read, rtol=5e-3, atol=0)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Sigmoid()])
@torch.no_grad()
def test_what_lets_no_factor_pass_is_refused_and_stays(act: nn.Module) -> None:
    net = Net(act).eval()
    state = copy.deepcopy(net.state_dict())
    found = equalise(net, images(), seed=0)
    assert not found.pairs and found.refused == [" → ".join(pair) for pair in PAIRS]
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@torch.no_grad()
def test_a_second_reader_is_seen() -> None:
    net = Net(nn.ReLU(), shortcut=True).eval()
    assert equalise(net, images(), seed=0).pairs == PAIRS[:2]


def test_one_scale_per_layer_loses_much_less_once_ranges_are_equal() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    spread = 10 ** torch.linspace(-2, 0, 16)
    net[0].weight.data *= spread.view(-1, 1, 1, 1)
    net[2].weight.data /= spread.view(1, -1, 1, 1)
    net, errors = net.eval(), []
    for wanted in (False, True):
        tree = {"equalise": wanted, "stages": [{"quantize": {"method": "rtn", "weights": "int8-tensor"}}]}
        found = compress_vision(net, [images(n) for n in range(4)], VisionRecipe.from_tree(tree, "t"))
        assert bool(found.report.equalised) == wanted
        with torch.no_grad():
            x = images(9)
            errors.append(float((found.module(x) - net(x)).norm() / net(x).norm()))
    assert errors[1] < errors[0] / 3
