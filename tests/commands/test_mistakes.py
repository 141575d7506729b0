"""A mistake on the command line is one line that names it, exit code 2 and an untouched disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmcompress import cli

RECIPES = [
    (["--recipe", "jsk"], "no recipe 'jsk'; did you mean 'jsq'?"),
    (["--recipe", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
    (["--set", "prun.sparsity=0.5"], "no stage 'prun'; did you mean 'prune'?"),
    (["--set", "prune.sparsty=0.5"], "unknown key 'sparsty'; did you mean 'sparsity'?"),
    (["--set", "prune.method=wandaa"], "no method 'wandaa' for stage prune; did you mean 'wanda'?"),
    (["--set", "propagate=compresed"], "unknown 'compresed'; did you mean 'compressed'?"),
    (["--set", "prune"], "'prune' is not stage.key=value"),
    (["--recipe", "jsq", "--set", "quantize.weights=int9"], "quantize.weights: 9 bits; use 2 to 8"),
    (["--recipe", "jsq", "--set", "quantize.weights={bit: 6}"], "unknown key 'bit'; did you mean 'bits'?"),
    (["--recipe", "jsq", "--set", "smooth.alpha=high"], "smooth.alpha: 'high' is not a number"),
    (["--set", "prune.sparsity=1.0"], "prune.sparsity: 1.0 is outside [0, 1)"),
    (["--set", "prune.sparsity=-0.1"], "prune.sparsity: -0.1 is outside [0, 1)"),
    (["--set", "prune.sparsity=nan"], "prune.sparsity: nan is outside [0, 1)"),
    (["--set", "prune.sparsity=5:4"], "pattern 5:4 does not keep 0 < N < M"),
    (["--set", "prune.sparsity=3:5"], "q_proj: pattern 3:5 does not divide 32 input columns; use an M of 2, 4, 8"),
    (
        ["--recipe", "rtn-w8a8", "--set", "quantize.weights=int4-g24"],
        "layers.0.self_attn.q_proj: group size 24 does not divide 32 input columns; use one of 8, 16, 32",
    ),
    (["--set", "targets.include=[nothing]"], "no matrix is targeted"),
]
OPTIONS = [
    (["--recipee", "jsq"], "unrecognized arguments: --recipee jsq"),
    (["compress"], "unrecognized arguments: compress"),
    (["--samples", "0"], "--samples: 0 rows"),
    (["--samples", "many"], "--samples: invalid int value"),
    (["--length", "1"], "--length: rows of 1 tokens"),
    (["--length", "65"], "more than the model's 64 positions; use at most 64"),
    (["--seed", "-1"], "seed -1 is negative"),
    (["--device", "tpu"], "--device: invalid choice"),
    (["--no-eval", "--eval-text", "words.txt"], "not allowed with argument"),
    (["--samples", "100"], "600 tokens, but 100 rows of 16 need 1600; give a longer text or --samples 37"),
    (["--eval-text", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--output", ""], "already exists"),
]


@pytest.mark.parametrize(("arguments", "line"), RECIPES + OPTIONS, ids=lambda value: value[-1] or "empty")
def test_a_mistake_is_one_line_that_names_it(refusal: Callable[..., str], arguments: list[str], line: str) -> None:
    assert line in refusal(*arguments)


def test_a_mistake_in_a_recipe_file_names_the_file(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("stages: [a: b: c")
    assert "own.yaml: not readable as YAML" in refusal("--recipe", "own.yaml")
    (tmp_path / "own.yaml").write_text("stages: [prne]")
    assert "recipe own: unknown stage 'prne'; did you mean 'prune'?" in refusal("--recipe", "own.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused(refusal: Callable[..., str]) -> None:
    assert "no CUDA device is available; use --device cpu" in refusal("--device", "cuda")


def test_no_model_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "arguments are required: --model" in capsys.readouterr().err


def test_an_existing_output_is_refused_before_the_model_is_looked_for(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for extra in ([], ["--dry-run"]):
        assert "out: already exists; choose another" in refusal("--output", "out", *extra, model="no/model")
    (tmp_path / "out" / "mine.txt").touch()
    assert "is not an output of this program" in refusal("--output", "out", "--force")


def test_the_model_itself_is_never_the_output(refusal: Callable[..., str], altered: Callable[..., Path]) -> None:
    folder = altered()
    (folder / "llmcompress.json").write_text("{}")  # as if this program had made it
    assert "would overwrite the input model" in refusal("--output", folder, "--force", model=folder)
