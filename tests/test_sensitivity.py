"""Sparsity by measured sensitivity: the allotment against a brute-force search, the measurement against compressions of
one block that are written and judged, and a run against one with the ratios given by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmcompress import Recipe, api, compress
from llmcompress.alone import Sensitivity
from llmcompress.errors import UserError
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.report import Report
from llmcompress.sensitivity import LIMIT, allot
from tests.architectures import tiny_folder

TOKENS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
TRIED = (0.4, 0.6)
BLOCKS = 3


def cost(costs: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The sum over the blocks (the last axis) where log KL is straight in the ratio."""
    slope = np.diff(np.log(costs))[:, 0] / (TRIED[1] - TRIED[0])
    return np.exp(np.log(costs[:, 0]) + slope * (ratios - TRIED[0])).sum(-1)


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_ratios_with_as_many_zeros_cost_less(seed: int, shares: tuple[float, ...]) -> None:
    random = np.random.default_rng(seed)
    low = random.uniform(-7, -4, 3)
    costs = np.exp(np.stack([low, low + random.uniform(1, 2.5, 3)], axis=1))
    found = np.array(allot(costs, TRIED, 0.5, np.array(shares)))
    assert found @ shares == pytest.approx(0.5, abs=1e-9) and np.abs(found - 0.5).max() <= LIMIT + 1e-9
    grid = np.linspace(0.5 - LIMIT, 0.5 + LIMIT, 81)
    last = [(a, b, (0.5 - a * shares[0] - b * shares[1]) / shares[2]) for a, b in product(grid, grid)]
    others = np.array([ratios for ratios in last if abs(ratios[2] - 0.5) <= LIMIT])
    assert cost(costs, found) <= cost(costs, others).min() * (1 + 1e-9)


def test_blocks_that_are_alike_have_the_same_ratio() -> None:
    assert allot(np.array([[0.002, 0.011]] * 4), TRIED, 0.5, np.full(4, 0.25)) == pytest.approx([0.5] * 4)


def test_a_block_that_costs_nothing_takes_what_it_may() -> None:
    found = allot(np.array([[0.0, 0.0], [0.002, 0.011]]), TRIED, 0.5, np.array([0.5, 0.5]))
    assert found == pytest.approx([0.5 + LIMIT, 0.5 - LIMIT])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=BLOCKS)


def rows(folder: Path, name: str, tokens: torch.Tensor) -> str:
    file = folder / f"{name}.safetensors"
    save_file({"input_ids": tokens.contiguous()}, file)
    return str(file)


def test_the_cost_of_a_block_is_that_of_a_model_with_it_alone_compressed(source: Path, tmp_path: Path) -> None:
    """The same recipe for one block, written and judged by the evaluation."""
    prune = {"prune": {"method": "sparsegpt", "sparsity": 0.6}}
    recipe = Recipe.from_tree({"stages": [prune], "propagate": "dense"}, "all")
    engine = Sensitivity(BlockwiseModel(Checkpoint(source), torch.float32), TOKENS, 0.25)
    found = engine.costs(recipe)
    judges = torch.zeros(len(TOKENS), dtype=torch.bool)
    judges[engine.held] = True
    assert len(engine.held) == 2
    options = api.Options(rows(tmp_path, "calibration", TOKENS[~judges]), 6, 24, dtype="float32",
                          eval_text=rows(tmp_path, "judges", TOKENS[judges]))  # fmt: skip
    for index, one in enumerate(found):
        name = f"model.layers.{index}"
        tree = {"stages": [prune], "propagate": "dense", "targets": {"include": [f"{name}.*"]}}
        report = compress(source, Recipe.from_tree(tree, "alone"), tmp_path / name, options)
        assert one == pytest.approx(report.kl_divergence, rel=1e-4)


RECIPE: dict[str, Any] = {
    "stages": [{"prune": {"method": "sparsegpt", "sparsity": 0.5, "ratios": "auto"}}, {"quantize": {"weights": "int8"}}]
}


def options(folder: Path) -> api.Options:
    return api.Options(rows(folder, "rows", TOKENS), len(TOKENS), 24, evaluate=False, dtype="float32")


def test_a_run_writes_what_it_would_with_the_ratios_given_by_hand(source: Path, tmp_path: Path) -> None:
    report = compress(source, Recipe.from_tree(RECIPE, "auto"), tmp_path / "auto", options(tmp_path))
    ratios = report.sensitivity["ratios"]
    by_hand = Recipe.from_tree(RECIPE, "by hand", [f"prune.ratios={ratios}"])
    compress(source, by_hand, tmp_path / "by-hand", options(tmp_path))
    auto, known = (sorted((tmp_path / folder).glob("*.safetensors")) for folder in ("auto", "by-hand"))
    assert [file.read_bytes() for file in auto] == [file.read_bytes() for file in known]
    frugal = replace(options(tmp_path), low_memory=True)
    assert compress(source, Recipe.from_tree(RECIPE, "auto"), tmp_path / "low", frugal).sensitivity["ratios"] == ratios
    assert len(set(ratios)) > 1 and [block.sparsity for block in report.blocks] == pytest.approx(ratios, abs=0.01)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    saved = Report.from_json((tmp_path / "auto" / "report.json").read_text(encoding="utf-8"))
    assert saved.sensitivity == report.sensitivity and len(saved.sensitivity["kl"]) == BLOCKS
    assert "sparsity by measured sensitivity" in report.table()
    assert "Zeros by sensitivity" in (tmp_path / "auto" / "report.html").read_text(encoding="utf-8")


def test_the_plan_says_what_it_takes(source: Path, tmp_path: Path) -> None:
    plain = Recipe.from_tree(RECIPE, "plain", ["prune.ratios=[]"])
    found, without = (api.plan(source, r, options=options(tmp_path)) for r in (Recipe.from_tree(RECIPE, "auto"), plain))
    assert any("sparsity by sensitivity" in note for note in found.notes)
    assert found.peak_memory_bytes > without.peak_memory_bytes


@pytest.mark.parametrize(
    ("ratios", "what"), [([0.4, 0.6], "2 sparsity ratios for 3"), ([0.4, 0.5, 0.5], "0.4667 in the")]
)
def test_ratios_by_hand_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, ratios: list[float], what: str
) -> None:
    recipe = Recipe.from_tree(RECIPE, "by hand", [f"prune.ratios={ratios}"])
    with pytest.raises(UserError, match=what):
        compress(source, recipe, tmp_path / "out", options(tmp_path))
    assert not (tmp_path / "out").exists()
