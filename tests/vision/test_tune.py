"""Training keeps its promises: what is pruned stays zero, what is rounded stays on its grid, schedules end where they
should, and the same seed gives the same bytes."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.straight_through import round_through
from llmcompress.errors import UserError
from llmcompress.vision import VisionOptions, VisionRecipe, VisionRun, compress_vision, load_vision
from llmcompress.vision.channels import ChannelOptions
from llmcompress.vision.images import Images, digits
from llmcompress.vision.masks import ScoreOptions
from llmcompress.vision.soft import SoftFilters
from llmcompress.vision.tune import TuneOptions, train

SOME = digits().calibration(192, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10)).eval().requires_grad_(False)


def recipe(**sections: object) -> VisionRecipe:
    return VisionRecipe.from_tree({"tune": {"epochs": 2, "learn": "labels"}} | sections, "t")


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
@pytest.mark.parametrize("rounds", [1, 4, 7])
def test_a_schedule_grows_and_hits_its_target_exactly(schedule: str, rounds: int) -> None:
    options = ScoreOptions(Sparsity(0.8), schedule=schedule, rounds=rounds, ends=0.75)  # type: ignore[arg-type]
    found = list(dict.fromkeys(options.ratio_at(step / 400) for step in range(401)))
    assert len(found) == rounds and found == sorted(found) and found[-1] == 0.8
    assert options.ratio_at(0.75) == options.ratio_at(1.0) == 0.8
    left = [Fraction(number, rounds) for number in range(1, rounds + 1)]
    formula = [0.8 - 0.8 * float(1 - p) ** 3 if schedule == "gradual" else 1 - 0.2 ** float(p) for p in left]
    assert found == pytest.approx(formula)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_grown_masks_have_the_exact_count_and_stay_zero_to_the_end(schedule: str) -> None:
    scores = {"sparsity": 0.75, "schedule": schedule, "rounds": 3}
    found = compress_vision(network(), [SOME.pixels], recipe(scores=scores), labels=SOME.labels)
    every = torch.cat([w.flatten() for w in weights(found.module).values()])
    assert int((every == 0).sum()) == round(0.75 * len(every))
    assert [t["what"] for t in found.report.trainings] == ["while masks grew", "with masks and grids held"]
    masks = found.masks
    assert all(bool((w[~masks[n.removesuffix(".weight")]] == 0).all()) for n, w in weights(found.module).items())
    assert found.report.sparsity == pytest.approx(0.75, abs=1e-4)


def test_pruned_weights_stay_zero_while_the_others_are_trained() -> None:
    stages = [{"prune": {"method": "wanda", "sparsity": 0.5}}]
    found = compress_vision(network(), [SOME.pixels], recipe(stages=stages), labels=SOME.labels)
    before = compress_vision(network(), [SOME.pixels], VisionRecipe.from_tree({"stages": stages}, "t"))
    for name, weight in weights(found.module).items():
        old = before.module.get_parameter(name)
        assert torch.equal(weight == 0, old == 0) and not torch.equal(weight, old)


STEPS = ({"weights": "int4-mse", "activations": "int8-static-asym"}, {"weights": "int3-g8-asym"}, {"weights": "fp8"})


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_trained_weights_lie_on_the_grid_they_were_calibrated_for(step: dict[str, str]) -> None:
    stages = [{"prune": {"method": "magnitude", "sparsity": 0.5}}, {"quantize": {"method": "rtn", **step}}]
    trees = [
        {"stages": stages, "targets": {"exclude": ["0"]}} | more for more in ({}, {"tune": {"epochs": 3, "rate": 0.02}})
    ]
    plain, tuned = (compress_vision(network(), [SOME.pixels], VisionRecipe.from_tree(t, "t")).module for t in trees)
    for name in ("3", "6"):
        one, other = plain.get_submodule(name).rounding, tuned.get_submodule(name).rounding
        assert torch.equal(one.weight.levels.scale, other.weight.levels.scale)
        assert not torch.equal(one.weight.codes, other.weight.codes)
        weight = tuned.get_parameter(f"{name}.weight")
        assert torch.equal(weight.flatten(1), other.weight.dequantize())
        assert not bool(weight[plain.get_parameter(f"{name}.weight") == 0].count_nonzero())


@pytest.mark.parametrize("grid", [QuantGrid(4), QuantGrid(3, False), QuantGrid(8, kind="fp8")], ids=lambda g: g.kind)
def test_the_gradient_of_rounding_is_the_identitys_inside_the_range(grid: QuantGrid) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    levels = grid.fit(x * 0.5)  # so that something is clipped
    found, slope = x.clone().requires_grad_(), torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    rounded = round_through(grid, found, levels)
    torch.testing.assert_close(rounded, grid.round(x, levels))
    (rounded * slope).sum().backward()
    ends = [grid.round(torch.full_like(x, end), levels) for end in (-1e9, 1e9)]
    inside = (x > ends[0]) & (x < ends[1])
    assert inside.any() and (~inside).any()
    torch.testing.assert_close(found.grad[inside], slope[inside])
    step = levels.scale.expand_as(x) / 2  # what lies beyond the last level by less is not clipped
    outside = (x < ends[0] - step) | (x > ends[1] + step)
    assert not bool(found.grad[outside].any())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    tree = {"stages": [{"quantize": {"method": "rtn", "weights": "int4"}}], "tune": {"epochs": 1}}
    files = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)  # what happened before does not matter
        options = VisionOptions(samples=64, seed=seed, evaluate=False)
        run = VisionRun("resnet", VisionRecipe.from_tree(tree, "t"), tmp_path / str(number), options)
        run.data = run.data.__class__(run.data.train.take(slice(0, 128)), run.data.test)
        run.execute()
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    codes = load_vision(tmp_path / "0").get_submodule("stem.0").rounding.weight
    assert torch.equal(codes.dequantize(), load_vision(tmp_path / "1").get_parameter("stem.0.weight").flatten(1))


def test_the_dense_network_is_the_teacher_and_stays_as_it_is() -> None:
    dense = network()
    before, pupil = copy.deepcopy(dense.state_dict()), copy.deepcopy(dense)
    slow = TuneOptions(epochs=1, rate=1e-9)
    assert train(pupil, dense, SOME, slow, 0, renew=False)["loss"][0] == pytest.approx(0.0, abs=1e-6)
    wrong = network()
    wrong[6].weight.data.neg_()
    losses = train(wrong, dense, SOME, TuneOptions(epochs=6), 0)["loss"]
    assert losses[-1] < losses[0] / 2
    compress_vision(dense, [SOME.pixels], recipe(scores={"sparsity": 0.5}), labels=SOME.labels)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_labels_are_asked_for_where_they_are_learnt() -> None:
    unknown = Images(SOME.pixels, None)
    for learn in ("labels", "both"):
        with pytest.raises(UserError, match="the images have none"):
            train(network(), network(), unknown, TuneOptions(learn=learn), 0)  # type: ignore[arg-type]


def test_soft_filters_are_zeroed_as_many_as_will_go_and_can_grow_back() -> None:
    module = network()
    wanted = ChannelOptions(ratio=0.5, multiple=4)
    filters = SoftFilters(module, wanted, lambda name: True, SOME.pixels[:2])
    filters()
    zero = {name: ~module.get_parameter(f"{name}.weight").flatten(1).any(1) for name in filters.zeroed}
    assert {name: int(lost.sum()) for name, lost in zero.items()} == filters.zeroed == {"0": 8}
    train(module, network(), SOME, TuneOptions(epochs=1), 0)
    assert any(bool(module.get_parameter(f"{name}.weight")[lost].any()) for name, lost in zero.items())
    found = compress_vision(
        network(), [SOME.pixels], recipe(channels={"ratio": 0.5, "multiple": 4}, tune={"epochs": 1, "soft": True})
    )
    assert [s["after"] for s in found.report.channels] == [8]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"scores": {"sparsity": 0.5, "schedule": "gradual"}}, "add tune"),
        ({"scores": {"sparsity": "2:4", "scope": "layer", "schedule": "gradual"}, "tune": {}}, "cannot grow"),
        ({"scores": {"sparsity": 0.5}, "tune": {"soft": True}}, "add channels"),
        ({"scores": {"sparsity": 0.5}, "tune": {"epochs": 0}}, "use 1 or more"),
        ({"scores": {"sparsity": 0.5}, "tune": {"rate": -1}}, "no learning rate"),
    ],
)
def test_sections_that_do_not_fit_are_refused(tree: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        VisionRecipe.from_tree(tree, "t")
