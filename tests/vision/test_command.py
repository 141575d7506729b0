"""The command on what a new user may have: nothing, a folder of transformers, a function, images in folders; and what a
machine may do to it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcompress.cli import main
from llmcompress.vision import VisionOptions, VisionRun, load_vision
from llmcompress.vision.walk import LayerWalk

NET = """
from torch import nn
def make():
    layers = [nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)]
    return nn.Sequential(*layers)
"""
CONFIGS = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 16},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(file: Path, count: int = 40, classes: int = 3, channels: int = 3, side: int = 16) -> str:
    drawn = np.random.default_rng(0)
    pixels = drawn.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    np.savez(file, images=pixels, labels=drawn.integers(0, classes, count))
    return str(file)


def test_without_arguments_it_compresses_the_bundled_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision"]) == 0
    said = capsys.readouterr()
    assert "accuracy on held-out images" in said.out and said.err
    made = place / "compressed" / "resnet-int8"
    assert {f.name for f in made.iterdir()} == {
        "model.safetensors", "network.json", "recipe.yaml", "report.json", "report.html", "llmcompress.json",
    }  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_of_transformers_goes_in_and_comes_back(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_labels=3, **CONFIGS[kind])
    AutoModelForImageClassification.from_config(config).save_pretrained(place / "dense")
    data = images(place / "images.npz")
    line = ["vision", "--model", "dense", "--data", data, "--samples", "16", "--recipe", "int4", "--json"]
    line += ["--set", "targets.exclude=['*conv_3x3*']"]  # hundreds of groups of one channel
    assert main([*line, "--output", "out"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"]["before"] is not None and report["effective_bits"] < 20
    module = load_vision("out")
    with torch.no_grad():
        assert module(torch.rand(2, 3, 16, 16)).logits.shape == (2, 3)
    assert main(["inspect", "dense"]) == main(["--model", "dense"]) == 2
    assert capsys.readouterr().err.count("this is for language models") == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_function_and_a_folder_for_each_class_in_grey_or_in_colours(channels: int, place: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (place / "own_net.py").write_text(NET.replace("{channels}", str(channels)))
    drawn = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (place / "images" / name).mkdir(parents=True)
        for number in range(6):
            image.fromarray(drawn.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(f"images/{name}/{number}.png")
    options = VisionOptions(data="images", samples=8, image_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(__import__("sys").modules, "own_net", raising=False)
        run = VisionRun("own_net:make", "int8", "out", options)
        patch.delitem(__import__("sys").modules, "own_net", raising=False)
    assert run.images.pixels.shape[1:] == (channels, 8, 8)
    assert run.execute().accuracy["after"] is not None


def test_an_interruption_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerWalk, "_commit", stop)
    assert main(["vision", "--samples", "16", "--output", "deep/out"]) == 130
    assert capsys.readouterr().err.endswith("llmcompress: interrupted, nothing was written\n")
    assert not list(place.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fills_up_or_fails_is_one_line_and_leaves_nothing(
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("llmcompress.export.checkpoint.sync", fail)
    assert main(["vision", "--samples", "16", "--no-eval", "--output", "deep/out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ("the disk is full" if number == errno.ENOSPC else os.strerror(number)) in error
    assert error.startswith("llmcompress: ") and not list(place.iterdir())


def test_force_replaces_an_output_and_nothing_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("precious")
    line = ["vision", "--samples", "16", "--no-eval", "--recipe", "magnitude-50", "--output"]
    assert main([*line, "mine", "--force"]) == 2
    assert "is not an output of this program" in capsys.readouterr().err
    assert main([*line, "out"]) == 0 and main([*line, "out"]) == 2 and main([*line, "out", "--force"]) == 0
    assert sorted(f.name for f in place.iterdir()) == ["mine", "out"]


def test_json_is_nothing_but_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["vision", "--samples", "16", "--json", "--set", "quantize.weights=int6", "--output", "out"]
    assert main([*line, "--dry-run"]) == 0
    plan = capsys.readouterr()
    assert json.loads(plan.out)["layers"] and plan.err == "" and not list(place.iterdir())
    assert main(line) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((place / "out" / "report.json").read_text()) and said.err == ""
