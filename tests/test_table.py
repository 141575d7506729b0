"""The table of JSQ: cells that are recorded are not run again, and its figures are what their names say."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import Recipe, compress, load
from llmcompress.api import Options
from llmcompress.report import MatrixReport

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """The script, with its neighbours beside it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("table_jsq")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def arguments(checkpoint: Path, text: Path, tmp_path: Path) -> list[str]:
    """A table of one cell on a tiny model."""
    given = {"--model": checkpoint, "--calibration": text, "--eval-text": text, "--out": tmp_path / "out"}
    small = {"--samples": 4, "--length": 16, "--eval-rows": 6, "--methods": "JSQ", "--budgets": "W8A8 + 2:4"}
    return [str(x) for pair in (given | small).items() for x in pair]


@pytest.fixture
def runs(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Recipe and seed of every compression that is started."""
    started: list[tuple[str, int]] = []

    def counted(model: str, recipe: str, output: Path, options: Options, **given: Any) -> Any:
        started.append((recipe, options.seed))
        return compress(model, recipe, output, options, **given)

    monkeypatch.setattr(table, "compress", counted)
    return started


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out" / "table.json").read_text())["cells"]


def test_a_second_run_does_only_what_is_missing(
    table: ModuleType, arguments: list[str], runs: list[tuple[str, int]], tmp_path: Path
) -> None:
    assert table.main(arguments) == 0 and runs == [("jsq-2of4", 0)]
    assert table.main([*arguments, "--seeds", "2"]) == 0 and runs[1:] == [("jsq-2of4", 1)]
    assert table.main([*arguments, "--seeds", "2"]) == 0 and len(runs) == 2
    calibrations = {r["settings"]["calibration"]["tokens"] for r in records(tmp_path)}
    assert len(calibrations) == 2
    assert (tmp_path / "out" / "table.png").stat().st_size > 0
    assert not [p for p in (tmp_path / "out").iterdir() if p.name not in ("table.json", "table.md", "table.png")]


def test_an_interrupted_run_keeps_the_cells_it_finished(
    table: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = table.Table.measure

    def interrupted(self: Any, cell: Any, judge: Any) -> dict[str, Any]:
        if cell.seed:
            raise KeyboardInterrupt
        return measure(self, cell, judge)

    monkeypatch.setattr(table.Table, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table.main([*arguments, "--seeds", "2"])
    assert [r["seed"] for r in records(tmp_path)] == [0]


def test_a_changed_recipe_runs_its_cell_again(
    table: ModuleType,
    arguments: list[str],
    runs: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table.main(arguments)
    overrides, _ = table.BUDGETS["W8A8 + 2:4"]
    monkeypatch.setitem(table.BUDGETS, "W8A8 + 2:4", ((*overrides, "smooth.alpha=0.5"), "-no-such-recipe"))
    table.main(arguments)
    (record,) = records(tmp_path)
    assert [recipe for recipe, _ in runs] == ["jsq-2of4", "jsq"]
    assert record["settings"]["recipe_hash"] == Recipe.load("jsq", [*overrides, "smooth.alpha=0.5"]).hash


def test_every_cell_is_at_the_budget_it_is_listed_under(table: ModuleType) -> None:
    ratios = {"50 %": 0.5, "43.75 %": 0.4375, "85.94 %": 0.859375, "2:4": 0.5, "4:8": 0.5}
    for cell in table.cells(list(table.METHODS), list(table.BUDGETS), 1):
        recipe = Recipe.load(cell.recipe, cell.overrides)
        bits, _, pattern = cell.budget.partition(" + ")
        weights, sparsity = (bits, pattern) if bits.startswith("W") else ("", bits)
        grids = [(m.weights.bits, m.activations.bits) for m in recipe.methods if m.stage == "quantize"]
        assert grids == ([(int(weights[1]), int(weights[3]))] if weights else []), cell
        given = recipe.structured.sparsity if recipe.structured else recipe.sparsity
        found = getattr(given, "ratio", given) or 0.0
        assert found == pytest.approx(ratios.get(sparsity, 0.0)), cell
        assert not recipe.structured and ":" in str(given) if ":" in sparsity else True, cell


def test_words_are_counted_once_and_only_where_they_begin_in_a_predicted_token(table: ModuleType) -> None:
    count = sys.modules["table_jsq_judge"].words_begun
    text = " ab cd\n\nefg h"
    offsets = [(0, 2), (2, 3), (3, 6), (6, 8), (8, 10), (10, 11), (11, 13)]  # ' a' 'b' ' cd' '\n\n' 'ef' 'g' ' h'
    assert count(text, offsets, [True] * 7) == len(text.split()) == 4
    assert [count(text, offsets, [i == j for i in range(7)]) for j in range(7)] == [1, 0, 1, 0, 1, 0, 1]
    assert count("é x", [(0, 1), (0, 1), (1, 3)], [False, True, True]) == 1  # a character of two tokens is the first's


@torch.no_grad()
def test_perplexity_per_word_spreads_the_whole_loss_over_the_words(
    table: ModuleType, arguments: list[str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    table.main(arguments)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text())["input_ids"][: 6 * 16]
    rows = torch.tensor(ids).view(6, 16)
    logits = AutoModelForCausalLM.from_pretrained(checkpoint)(rows).logits.double()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    dense = json.loads((tmp_path / "out" / "table.json").read_text())["dense"]["texts"][text.stem]
    assert dense["words"] == dense["tokens"] == 6 * 15  # the tokenizer's tokens are words
    assert dense["perplexity"] == pytest.approx(math.exp(float(loss) / 90), rel=1e-5)
    per_word = sys.modules["table_jsq_judge"].per_word
    assert per_word(dense["perplexity"], 90, 30) == pytest.approx(math.exp(float(loss) / 30), rel=1e-4)


@torch.no_grad()
def test_multiply_accumulates_are_those_of_a_forward(table: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    report = compress(
        checkpoint, "wanda-2of4", tmp_path / "out", Options(samples=4, length=16, evaluate=False, dtype="float32")
    )
    counted = sys.modules["table_jsq_judge"].multiply_accumulates(report.matrices)
    model = load(tmp_path / "out")
    done = {"macs": 0, "nonzero_macs": 0}

    def count(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for x in args[0].flatten(0, -2):
            products = torch.ones_like(x)[None] * module.weight
            done["macs"] += products.numel()
            done["nonzero_macs"] += int((products != 0).sum())

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(torch.arange(3, 8)[None])
    assert {key: value / 5 for key, value in done.items()} == counted
    assert counted["nonzero_macs"] * 2 == counted["macs"]


def test_zeros_of_every_matrix_are_subtracted_once(table: ModuleType) -> None:
    matrices = [MatrixReport("a", (4, 8), 0.25, 8.0), MatrixReport("b", (2, 2), 0.5, 8.0)]
    found = sys.modules["table_jsq_judge"].multiply_accumulates(matrices)
    assert found == {"macs": 36, "nonzero_macs": 24 + 2}
