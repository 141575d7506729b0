"""Bits by layer: the allocation against brute force, curvature against the Hessian written out, budgets held."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmcompress.cli import main
from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.vision import VisionRecipe, load_vision
from llmcompress.vision.curvature import Curvature
from llmcompress.vision.images import digits
from llmcompress.vision.mixed import MixedOptions, allocate, choose_bits, sensitivities

PIXELS = digits().calibration(32, 0).pixels
NAMES = ["0", "3"]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).eval()


def hessian_of(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Written out, in float64: the divergence of the answers from those of now."""
    module, x = copy.deepcopy(module).double(), x.double()
    weight = module.get_submodule(name).weight
    said = module(x).softmax(1).detach()

    def loss(flat: Tensor) -> Tensor:
        answers = torch.func.functional_call(module, {f"{name}.weight": flat.view_as(weight)}, (x,))
        return (said * (said.log() - answers.log_softmax(1))).sum() / len(x)

    return torch.autograd.functional.hessian(loss, weight.detach().flatten())


def test_products_and_eigenvalues_are_those_of_the_hessian_written_out() -> None:
    module = tiny()
    curvature = Curvature(module, NAMES, PIXELS)
    found = curvature.top_eigenvalues(seed=0)
    for layer, name in enumerate(NAMES):
        H, v = hessian_of(module, name, PIXELS), torch.randn(module.get_submodule(name).weight.shape)
        torch.testing.assert_close(
            curvature.product(layer, v).flatten().double(), H @ v.flatten().double(), rtol=1e-3, atol=1e-5
        )
        assert found[layer] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=0.02)
    assert all(p.grad is None for p in module.parameters())


def test_traces_are_within_their_statistical_error() -> None:
    module, probes = tiny(), 200
    found = Curvature(module, NAMES, PIXELS).traces(seed=0, probes=probes)
    whole = sum(float(hessian_of(module, name, PIXELS).square().sum()) for name in NAMES)
    for name, trace in zip(NAMES, found, strict=True):
        exact = float(hessian_of(module, name, PIXELS).trace())
        assert trace == pytest.approx(exact, abs=5 * (2 * whole / probes) ** 0.5)  # blocks between layers add some


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    losses = torch.rand(5, 3, generator=g) * torch.tensor([10.0 ** (seed % 4), 1.0, 0.01])
    costs = torch.randint(1, 60, (5, 1), generator=g) * torch.tensor([[2, 4, 8]])
    most = int(costs[:, 0].sum() * 1.7)
    chosen = allocate(losses, costs, most)
    rows = range(5)
    sums = {
        pick: sum(float(losses[r, pick[r]]) for r in rows)
        for pick in itertools.product(range(3), repeat=5)
        if sum(int(costs[r, pick[r]]) for r in rows) <= most
    }
    assert tuple(chosen) in sums and sums[tuple(chosen)] == pytest.approx(min(sums.values()), rel=1e-6)


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UserError, match="the fewest"):
        allocate(torch.ones(2, 2), torch.tensor([[4, 8], [4, 8]]), 7)
    with pytest.raises(UserError, match="fewest bits everywhere"):
        MixedOptions(bits=(3, 4), average=2.5)
    with pytest.raises(UserError, match="no stage rounds weights"):
        VisionRecipe.from_tree({"mixed": {}, "stages": [{"quantize": {"method": "rtn", "weights": "fp8"}}]}, "t")


@pytest.mark.parametrize("kind", ["output", "hessian", "trace"])
def test_sensitivity_falls_with_bits_and_leaves_the_network_as_it_was(kind: str) -> None:
    module = tiny()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = sensitivities(module, NAMES, [QuantGrid(b) for b in (2, 4, 8)], kind, PIXELS, seed=0)
    assert all(s[0] > s[1] > s[2] > 0 for s in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("budget", [MixedOptions((2, 3, 4), average=3.0), MixedOptions((3, 8), bytes=40)])
def test_the_choice_keeps_the_budget_and_loses_no_more_than_the_same_bits_everywhere(budget: MixedOptions) -> None:
    recipe = VisionRecipe.from_tree({"stages": [{"quantize": {"method": "rtn", "weights": "int4"}}]}, "t")
    found = choose_bits(tiny(), [["0"], ["3"]], recipe.methods, budget, PIXELS, seed=0)
    bits = {layer["name"]: layer["bits"] for layer in found.told["layers"]}
    assert 27 * bits["0"] + 48 * bits["3"] <= budget.most(75) == (320 if budget.bytes else 225)
    assert found.told["total"] <= found.told["uniform"]["total"]
    assert {name: steps[0].weights.bits for name, steps in found.methods.items()} == bits  # type: ignore[attr-defined]


def test_the_report_lists_the_bits_that_the_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["vision", "--recipe", "mixed-int4", "--samples", "64", "--output", str(tmp_path / "out")]
    assert (
        main([*arguments, "--set", "mixed.bits=[2,4]", "--set", "mixed.average=3", "--set", "quantize.method=rtn"]) == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mixed"]["used_bits"] <= 3 * sum(layer["weights"] for layer in report["mixed"]["layers"])
    module = load_vision(tmp_path / "out")
    for layer in report["mixed"]["layers"]:
        assert module.get_submodule(layer["name"]).rounding.weight.grid.bits == layer["bits"]
    assert "mixed precision" in capsys.readouterr().out
