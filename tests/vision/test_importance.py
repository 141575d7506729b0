"""Importances against their formulas in plain loops, and the repair against least squares in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.errors import UserError
from llmcompress.vision import VisionRecipe, compress_vision
from llmcompress.vision.channels import Space, spaces, zeroed
from llmcompress.vision.graph import ChannelGraph, channel_graph
from llmcompress.vision.images import Images, digits
from llmcompress.vision.importance import unit_scores
from llmcompress.vision.network import open_network
from llmcompress.vision.reconstruct import entry_order, lasso, removal_order
from llmcompress.vision.removal import repair

IMAGES = Images(torch.rand(70, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(70) % 3)


class Two(nn.Module):
    """A convolution whose channels a convolution and, flattened, a Linear read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 7, 3), nn.Conv2d(7, 5, 3)
        self.head, self.out = nn.Linear(7 * 16, 3), nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(x.flatten(1)) + self.out(self.second(x).flatten(1))


def opened() -> tuple[Two, ChannelGraph, Space]:
    torch.manual_seed(0)
    module = Two().eval().requires_grad_(False)
    graph = channel_graph(module, IMAGES.pixels[:2])
    return module, graph, next(s for s in spaces(module, graph) if s.name == "first")


def score(importance: str) -> Tensor:
    module, graph, space = opened()
    return unit_scores(module, graph, [space], importance, IMAGES, 0)[0]


def parts(module: Two) -> list[tuple[Tensor, Tensor]]:
    """What each channel adds to the outputs of either reader (7, entries), and the reader's weights by channel."""
    module, x = copy.deepcopy(module).double(), IMAGES.pixels.double()
    h = F.relu(module.first(x))
    alone = [h * F.one_hot(torch.tensor(j), 7).view(1, 7, 1, 1) for j in range(7)]
    conv = torch.stack([F.conv2d(one, module.second.weight).flatten() for one in alone])
    linear = torch.stack([F.linear(one.flatten(1), module.head.weight).flatten() for one in alone])
    return [
        (conv, module.second.weight.transpose(0, 1).flatten(1)),
        (linear, module.head.weight.view(3, 7, 16).transpose(0, 1).flatten(1)),
    ]


def test_thinet_drops_at_each_step_the_channel_that_adds_least_to_what_readers_lose() -> None:
    added, gone = parts(opened()[0]), list[int]()
    while len(gone) < 7:
        losses = {
            j: sum(float(a[[*gone, j]].sum(0).square().sum() / a.sum(0).square().sum()) for a, _ in added)
            for j in range(7)
            if j not in gone
        }
        gone.append(min(losses, key=losses.__getitem__))
    assert score("thinet").argsort().tolist() == gone


def test_lasso_meets_the_conditions_of_its_optimum() -> None:
    X = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).double()
    G, q = X.T @ X, X.T @ torch.randn(40, generator=torch.Generator().manual_seed(2)).double()
    beta = lasso(G, q, float(q.abs().max()) / 4, torch.zeros(9).double())
    slope, penalty = q - G @ beta, float(q.abs().max()) / 4
    on = beta != 0
    assert 0 < int(on.sum()) < 9
    assert torch.allclose(slope[on], penalty * beta[on].sign(), rtol=1e-4)
    assert bool((slope[~on].abs() <= penalty * (1 + 1e-6)).all())


def test_channels_of_the_lasso_stay_in_the_order_in_which_they_enter() -> None:
    G = torch.diag(torch.tensor([1.0, 4.0, 0.25, 9.0]).double())  # apart from each other: |q_j| is where j enters
    assert entry_order(G, torch.ones(4).double()).argsort().tolist() == [2, 0, 1, 3]
    assert len(score("lasso").unique()) == 7 and removal_order(G).tolist() == [1, 2, 0, 3]


def test_a_repaired_layer_is_the_least_squares_solution_on_what_is_left() -> None:
    module, graph, space = opened()
    dense = copy.deepcopy(module)
    repair(module, graph, space.units[[1, 4, 5]], IMAGES)
    for (added, _), name in zip(parts(dense), ("second", "head"), strict=True):
        W = module.get_parameter(f"{name}.weight")
        by_channel = W.transpose(0, 1).flatten(1) if W.dim() == 4 else W.view(3, 7, 16).transpose(0, 1).flatten(1)
        assert (by_channel.abs().sum(1) == 0).tolist() == [j in (1, 4, 5) for j in range(7)]
        x = F.relu(dense.first(IMAGES.pixels)).double()[:, [0, 2, 3, 6]]
        rows = x.flatten(1) if name == "head" else F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
        aim = added.sum(0).view(70, -1, len(rows) // 70) if name == "second" else added.sum(0).view(70, 3)
        aim = aim.transpose(1, 2).flatten(0, 1) if name == "second" else aim
        best = (rows @ torch.linalg.lstsq(rows, aim).solution - aim).square().sum()
        kept = (
            W[:, [0, 2, 3, 6]].flatten(1) if W.dim() == 4 else W.view(3, 7, 16)[:, [0, 2, 3, 6]].flatten(1)
        ).double()
        found = (rows @ kept.T - aim).square().sum()
        scale = aim.square().sum()
        assert float(best / scale) > 1e-4 or name == "head"
        assert float((found - best) / scale) < 0.01


def test_a_repair_where_nothing_goes_changes_nothing() -> None:
    module, graph, space = opened()
    before = copy.deepcopy(module.state_dict())
    repair(module, graph, space.units[:0], IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_apoz_counts_the_zeros_that_readers_see() -> None:
    x = F.relu(opened()[0].first(IMAGES.pixels))
    torch.testing.assert_close(score("apoz"), (x != 0).float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_taylor_is_the_mean_square_of_the_first_order_loss_of_a_channel() -> None:
    module, _, _ = opened()
    total = torch.zeros(7)
    module.first.weight.requires_grad_(True)
    for x, y in zip(IMAGES.pixels.split(64), IMAGES.labels.split(64), strict=True):
        (g,) = torch.autograd.grad(F.cross_entropy(module(x), y), [module.first.weight])
        total += (g * module.first.weight.detach()).sum((1, 2, 3)).square()
    found = score("taylor")
    torch.testing.assert_close(found / found.sum(), total / total.sum(), rtol=1e-3, atol=1e-6)


def test_without_zeros_or_norms_an_importance_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3)).eval()
    for importance, said in (("apoz", "ever zero"), ("bn", "no BatchNorm")):
        recipe = VisionRecipe.from_tree({"channels": {"importance": importance, "multiple": 1}}, "t")
        with pytest.raises(UserError, match=said):
            compress_vision(net, IMAGES.batches(), recipe)


@pytest.mark.parametrize("importance", ["apoz", "thinet", "lasso", "taylor_bn", "random"])
def test_rounds_end_with_as_many_channels_as_one_shot(importance: str) -> None:
    data, module = digits().calibration(64, 0), open_network("resnet").module
    found = []
    for rounds in (1, 2):
        wanted = [f"channels.importance={importance}", f"channels.rounds={rounds}"]
        report = compress_vision(
            module, data.batches(), VisionRecipe.load("channels", wanted), labels=data.labels
        ).report
        found.append([entry["after"] for entry in report.channels])
        assert report.removal_error is not None and report.removal_error < 1e-4
    assert found[0] == found[1] == [8, 8, 8, 16, 16, 16, 32, 32, 32]


def test_repair_brings_a_network_nearer_to_the_dense_one() -> None:
    module, graph, space = opened()
    dense, gone = copy.deepcopy(module), space.units[:3]
    cut = zeroed(module, graph, gone)
    repair(module, graph, gone, IMAGES)
    meant = dense(IMAGES.pixels)
    assert (module(IMAGES.pixels) - meant).square().sum() < 0.5 * (cut(IMAGES.pixels) - meant).square().sum()
