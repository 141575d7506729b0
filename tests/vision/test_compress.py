"""From the bundled network to a folder: folds and rounding as the formulas say, figures promised, one-line errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from llmcompress.cli import main
from llmcompress.core.grid import QuantGrid
from llmcompress.core.observe import observed_range
from llmcompress.vision import VisionRecipe, compress_vision, load_vision
from llmcompress.vision.fold import fold_norms
from llmcompress.vision.images import digits
from llmcompress.vision.importance import score_masks
from llmcompress.vision.int8 import Int8Conv2d, to_int8
from llmcompress.vision.network import open_network
from llmcompress.vision.tune import reestimate
from llmcompress.vision.walk import input_groups

DATA = digits()
CALIBRATION = DATA.calibration(256, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return open_network("resnet").module


def right(module: nn.Module) -> float:
    with torch.no_grad():
        return float((module(DATA.test.pixels).argmax(1) == DATA.test.labels).float().mean())


def test_folding_takes_every_norm_of_a_residual_network_and_changes_no_output(resnet: nn.Module) -> None:
    module = copy.deepcopy(resnet)
    found = fold_norms(module, CALIBRATION.pixels[:4])
    assert len(found.pairs) == 15 and not found.refused
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    with torch.no_grad():
        torch.testing.assert_close(module(DATA.test.pixels), resnet(DATA.test.pixels), rtol=1e-4, atol=1e-4)


def test_a_norm_whose_input_something_else_reads_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (self.norm(y) + y).mean((2, 3))

    module = Net().eval().requires_grad_(False)
    module.norm.running_mean += 1.0
    before = module(CALIBRATION.pixels[:4])
    assert list(fold_norms(module, CALIBRATION.pixels[:4]).refused) == ["norm"]
    assert torch.equal(module(CALIBRATION.pixels[:4]), before)


def test_matrices_come_in_the_order_of_execution_and_a_shortcut_shares_no_rows(resnet: nn.Module) -> None:
    names = [[m.name for m in g.matrices] for g in input_groups(resnet, CALIBRATION.pixels[:1])]
    assert names[0] == ["stem.0"] and names[-1] == ["head"]
    assert ["stages.2.first.0"] in names and ["stages.2.shortcut.0"] in names and len(names) == 16


def test_int8_rounds_each_layer_by_the_formula_and_keeps_the_accuracy(resnet: nn.Module) -> None:
    found = compress_vision(resnet, CALIBRATION.batches(), "int8", overrides=["bias_correction=false"])
    folded = copy.deepcopy(resnet)
    fold_norms(folded, CALIBRATION.pixels[:4])
    w = folded.get_submodule("stem.0").weight  # in float32, as ties of the largest weight of a row fall by its last bit
    scale = w.abs().amax((1, 2, 3), keepdim=True) / 127.5
    rounded = (w / scale).round().clamp(-128, 127) * scale
    stem = found.module.get_submodule("stem.0")
    torch.testing.assert_close(stem.weight, rounded, rtol=1e-5, atol=1e-7)
    rounded = rounded.double()
    x = CALIBRATION.pixels[:8]
    step = CALIBRATION.pixels.amax() / 255
    seen = (((x / step - 128).round() + 128) * step).double()  # ties of signed codes, which are -128 for black
    torch.testing.assert_close(
        stem(x).double(), F.conv2d(seen, rounded, folded.get_submodule("stem.0").bias.double(), padding=1),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    assert right(found.module) >= right(resnet) - 0.005


def test_half_of_the_weights_go_within_a_point_without_training(resnet: nn.Module) -> None:
    found = compress_vision(resnet, DATA.calibration(512, 0).batches(), "sparsegpt-50")
    assert found.report.sparsity == pytest.approx(0.5, abs=1e-4)
    assert right(found.module) >= right(resnet) - 0.01
    assert all(float(m.float().mean()) == pytest.approx(0.5, abs=0.01) for m in found.masks.values())


def test_fitting_the_survivors_makes_up_for_a_mask_of_magnitudes(resnet: nn.Module) -> None:
    assert right(compress_vision(resnet, CALIBRATION.batches(), "magnitude-50-refit").module) >= right(resnet) - 0.01
    plain = compress_vision(resnet, CALIBRATION.batches(), "wanda-50")
    fitted = VisionRecipe.from_tree({"stages": [{"prune": {"sparsity": 0.5}}, {"prune": {"method": "refit"}}]}, "t")
    assert right(compress_vision(resnet, CALIBRATION.batches(), fitted).module) > right(plain.module) + 0.1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norms_are_reestimated_to_the_mean_statistics_of_what_reaches_them(momentum: float | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    reestimate(net, CALIBRATION)
    with torch.no_grad():
        seen = [net[0](x).double() for x in CALIBRATION.batches(64)]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(net[1].running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net[1].running_var.double(), variance, rtol=1e-4, atol=1e-6)
    assert net[1].momentum == momentum and not net[1].training


def test_calibration_corrects_the_mean_output_of_each_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, groups=1), nn.Flatten(), nn.Linear(288, 3)).eval()
    net.register_buffer("_unused", torch.zeros(1))
    recipe = VisionRecipe.from_tree({"stages": [{"prune": {"method": "magnitude", "sparsity": 0.5}}]}, "t")
    found = compress_vision(net, CALIBRATION.batches(), recipe).module
    x = CALIBRATION.pixels
    with torch.no_grad():
        torch.testing.assert_close(found[0](x).mean((0, 2, 3)), net[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("observer", ["percentile", "mse", "kl", "entropy"])
def test_an_observer_covers_no_more_than_the_extremes_and_ignores_an_outlier(observer: str) -> None:
    x = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 40.0
    grid = QuantGrid(6, False, "tensor", observer=observer)
    low, high = observed_range(grid, [x[:150], x[150:]])
    assert float(x.min()) <= float(low) <= 0 <= float(high) <= 40.0
    assert float(high) < (10.0 if observer == "percentile" else 40.0)
    if observer == "mse":
        full = grid.levels(x.amin().view(1, 1), x.amax().view(1, 1))
        error = [(grid.round(x, levels) - x).square().sum() for levels in (grid.levels(low, high), full)]
        assert error[0] < error[1]


@pytest.mark.parametrize("observer", ["mse", "kl", "entropy"])
def test_zeros_which_every_grid_has_do_not_move_a_range(observer: str) -> None:
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0)).relu()
    grid = QuantGrid(8, False, "tensor", observer=observer)
    ranges = [observed_range(grid, [rows]) for rows in (x, torch.cat([x, torch.zeros(4000, 20)]))]
    assert torch.equal(ranges[0][1], ranges[1][1]) and float(ranges[0][1]) > 2.0  # two standard deviations


@pytest.mark.parametrize("observer", ["percentile", "mse", "kl", "entropy"])
def test_every_observer_keeps_the_accuracy_of_int8(observer: str, resnet: nn.Module) -> None:
    overrides = [f"quantize.activations=int8-static-asym-{observer}"]
    found = compress_vision(resnet, DATA.calibration(64, 0).batches(), "int8", overrides=overrides)
    assert right(found.module) >= right(resnet) - 0.01


@pytest.mark.parametrize("score", ["magnitude", "snip", "taylor", "obd"])
def test_a_global_mask_drops_exactly_the_share_and_the_lowest_scores(resnet: nn.Module, score: str) -> None:
    recipe = VisionRecipe.load("global-50", [f"scores.score={score}", "scores.sparsity=0.25"])
    names = ["stages.0.first.0", "stages.4.first.0", "head"]
    assert recipe.scores is not None
    masks = score_masks(copy.deepcopy(resnet), names, recipe.scores.sparsity, score, "global", CALIBRATION)
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.25 * total)
    if score == "magnitude":
        weights = torch.cat([resnet.get_parameter(f"{n}.weight").abs().flatten() for n in names])
        kept = torch.cat([masks[n].flatten() for n in names])
        assert weights[~kept].max() <= weights[kept].min()


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("resnet", "channels-int8"), ("mobilenet", "channels-int8"), ("mobilenet", "int4-int8"), ("resnet", "power4"),
     ("resnet", "codebook4"), ("resnet", "fp8")],
)  # fmt: skip
def test_a_folder_reads_back_as_the_network_that_was_judged(model: str, recipe: str, tmp_path: Path) -> None:
    arguments = ["vision", "--model", model, "--recipe", recipe, "--samples", "64", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert right(load_vision(tmp_path / "out")) == pytest.approx(report["accuracy"]["after"], abs=1e-6)
    if recipe.endswith("int8"):
        assert right(to_int8(load_vision(tmp_path / "out"))) == pytest.approx(report["accuracy"]["after"], abs=0.01)
    assert report["size_bytes"]["after"] < report["size_bytes"]["before"] / 3
    assert main(arguments) == 2  # it is there already


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nope"], "neither a bundled network"),
        (["--model", "os:nope"], "cannot be called"),
        (["--recipe", "nope"], "no recipe"),
        (["--data", "nope"], "check --data"),
        (["--samples", "0"], "not positive"),
        (["--seed", "-1"], "seed -1 is negative"),
        (["--set", "channels.ratio=2", "--recipe", "channels"], "outside (0, 1)"),
        (["--set", "quantize.activations=int8"], "no tokens"),
        (["--recover-epochs", "-1"], "use 0 or more"),
        (["--recipe", "sparsegpt-2of4", "--on-misfit", "refuse"], "does not divide 9"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vision", "--samples", "16", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("llmcompress:") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_commands_for_language_models_say_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["vision", "--recipe", "magnitude-50", "--samples", "16", "--no-eval", "--output", str(out)]) == 0
    capsys.readouterr()
    lines = ([["inspect", str(out)], ["compare", str(out)], ["bench", str(out)], ["pack", str(out), "x"],
              ["generate", str(out), "--prompt", "x"], ["--model", str(out)]])  # fmt: skip
    for arguments in lines:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "holds a convolutional network, and this is for language models" in error and error.count("\n") == 1


def test_a_dry_run_prints_the_groups_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision", "--recipe", "channels", "--dry-run", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "stem.0, stages.0.second.0, stages.1.second.0" in shown and not list(tmp_path.iterdir())


def test_channels_of_a_layer_that_is_no_target_stay(resnet: nn.Module) -> None:
    recipe = VisionRecipe.load("channels", ["targets.exclude=[stages.0*]"])
    gone = {entry["name"] for entry in compress_vision(resnet, CALIBRATION.batches(), recipe).report.channels}
    assert "stages.1.first.0" in gone and not gone & {"stem.0", "stages.0.first.0"}  # a shortcut couples the stem
    assert VisionRecipe.from_tree(yaml.safe_load(recipe.to_yaml()), "t").targets("stages.0.first.0") is False


@pytest.mark.parametrize("model", ["resnet", "mobilenet"])
def test_integers_compute_what_the_rounded_network_computes(model: str) -> None:
    dense = open_network(model).module
    rounded = compress_vision(dense, CALIBRATION.batches(), "int8").module
    integers = to_int8(copy.deepcopy(rounded))
    assert any(isinstance(m, Int8Conv2d) for m in integers.modules())
    name = "stages.0.first.0" if model == "resnet" else "stages.0.depthwise.0"
    with torch.no_grad():  # inputs of the grid, as one that lies between two codes may fall to either
        x = rounded.get_submodule(name).rounded(torch.rand(4, rounded.get_submodule(name).in_channels, 8, 8))
        one, other = rounded.get_submodule(name)(x), integers.get_submodule(name)(x)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert right(integers) == pytest.approx(right(rounded), abs=0.005)
