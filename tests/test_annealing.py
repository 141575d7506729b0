"""A search over whole compressions: repeatable, resumable, true to what a compression from the beginning gives, and
gone from the result but for the ratios it found."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress import Recipe, api, compress
from llmcompress.annealing import Annealing, temperatures, with_ratios
from llmcompress.chain import Chain, accepts
from llmcompress.errors import UserError
from llmcompress.methods.clip import Clip
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.progress import Progress
from llmcompress.recompress import Attempt, Recompression, held_back
from llmcompress.report import Report
from llmcompress.resume import folder_of
from tests.architectures import tiny_folder

TOKENS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
CANDIDATES = [0, 0.01, 0.03, 0.1]
BLOCKS = 3


def tree(**given: Any) -> dict[str, Any]:
    annealed = {"search": "annealing", "candidates": CANDIDATES, "moves": 3, "temperature_end": 100}
    return {
        "stages": [
            {"clip": annealed | given},
            {"prune": {"method": "wanda", "sparsity": 0.5}},
            {"smooth": {}},
            {"quantize": {"weights": "int4-g8", "activations": "int8"}},
        ]
    }


RECIPE = Recipe.from_tree(tree(), "annealed")
MOVES = 6  # 3 each at the temperatures 300 and 150


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=BLOCKS)


def opened(source: Path, **given: Any) -> Recompression:
    return Recompression(BlockwiseModel(Checkpoint(source), torch.float32), TOKENS, 0.3, **given)


def search(source: Path, file: Path, seed: int = 0, recipe: Recipe = RECIPE, **given: Any) -> tuple[Recipe, dict]:
    return Annealing(recipe, opened(source, **given), seed, file).run()


def path_of(figures: dict) -> list[dict]:
    return [figures["start"], figures["best"], *figures["moves"]]


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return search(source, tmp_path_factory.mktemp("search") / "state.json")[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOKENS as a calibration file."""
    file = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    save_file({"input_ids": TOKENS}, file)
    return file


def options(rows: Path, **given: Any) -> api.Options:
    return api.Options(**{"calibration": str(rows), "samples": 6, "length": 24, "evaluate": False} | given)


def weights(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_seed_gives_the_same_search_and_another_another(source: Path, tmp_path: Path, found: dict) -> None:
    assert path_of(search(source, tmp_path / "again")[1]) == path_of(found)
    assert path_of(search(source, tmp_path / "other", seed=1)[1])[2:] != path_of(found)[2:]


@pytest.mark.parametrize("given", [{"every": 2}, {"every": BLOCKS}, {"replay": True}])
def test_what_is_kept_changes_nothing_but_the_work(source: Path, tmp_path: Path, found: dict, given: dict) -> None:
    other = search(source, tmp_path / "other", **given)[1]
    assert path_of(other) == path_of(found)
    assert other["compressed_blocks"] == sum(
        BLOCKS - move["block"] // given.get("every", 1) * given.get("every", 1)
        for move in [{"block": 0}, *other["moves"]]
    )


def test_the_search_takes_no_more_compressions_than_it_may(found: dict) -> None:
    assert len(found["moves"]) == MOVES
    assert found["compressions"] == MOVES + 1
    assert found["compressed_blocks"] == BLOCKS + sum(BLOCKS - move["block"] for move in found["moves"])


def test_the_best_is_never_worse_than_the_start_and_the_curve_is_that_of_the_accepted(found: dict) -> None:
    start = current = best = found["start"]["perplexity"]
    for move in found["moves"]:
        current = move["perplexity"] if move["accepted"] else current
        best = min(best, current)
        assert (move["current"], move["best"]) == (current, best)
    assert found["best"]["perplexity"] == best <= start


def test_the_perplexities_are_those_of_compressions_from_the_beginning_read_from_disk(
    source: Path, tmp_path: Path, found: dict
) -> None:
    held = torch.zeros(len(TOKENS), dtype=torch.bool)
    held[found["validation_rows"]] = True
    for name, part in (("fit", TOKENS[~held]), ("judged", TOKENS[held])):
        save_file({"input_ids": part}, tmp_path / f"{name}.safetensors")
    told = options(tmp_path / "fit.safetensors", samples=int((~held).sum()), evaluate=True,
                   eval_text=str(tmp_path / "judged.safetensors"))  # fmt: skip
    chain = Chain(found["start"]["ratios"], found["start"]["perplexity"])
    cases = [(chain.ratios, chain.current)]
    for move in found["moves"]:
        cases.append((chain.with_move(move["block"], move["ratio"]), move["perplexity"]))
        chain.take(*(move[key] for key in ("temperature", "block", "ratio", "perplexity", "accepted")))
    for number, (ratios, perplexity) in enumerate(cases):
        by_hand = compress(source, with_ratios(RECIPE, ratios), tmp_path / f"out{number}", told)
        assert by_hand.perplexity["after"] == pytest.approx(perplexity, rel=1e-6)
    assert len({perplexity for _, perplexity in cases}) > 2
    assert chain.best_ratios == found["best"]["ratios"]


@pytest.mark.parametrize("propagate", ["compressed", "block", "dense"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "phi3", "bloom"])
def test_going_on_from_a_block_equals_starting_from_the_first(model_type: str, propagate: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, propagate=propagate)
    engine = opened(tiny_folder(tmp_path, model_type))
    engine.accept(engine.attempt(with_ratios(recipe, [0.01, 0.01])))
    changed = with_ratios(recipe, [0.01, 0.2])
    assert engine.attempt(changed, 1).perplexity == engine.attempt(changed, 0).perplexity
    assert (engine.runs, engine.blocks) == (3, 5)


class Interrupted(Recompression):
    """Interrupted in the n-th compression."""

    at = 0

    def attempt(self, recipe: Recipe, first: int = 0) -> Attempt:
        if self.runs == self.at:
            raise KeyboardInterrupt
        return super().attempt(recipe, first)


@pytest.mark.parametrize("at", [1, 2, MOVES])
def test_resumed_equals_uninterrupted(source: Path, tmp_path: Path, found: dict, at: int) -> None:
    model = BlockwiseModel(Checkpoint(source), torch.float32)
    engine = Interrupted(model, TOKENS, 0.3)
    engine.at = at
    with pytest.raises(KeyboardInterrupt):
        Annealing(RECIPE, engine, 0, tmp_path / "state").run()
    resumed = search(source, tmp_path / "state")[1]
    assert path_of(resumed) == path_of(found)
    assert (resumed["resumed_after"], resumed["compressions"]) == (at - 1, MOVES - (at - 1) + 1)


def test_a_finished_search_is_not_repeated(source: Path, tmp_path: Path, found: dict) -> None:
    search(source, tmp_path / "state")
    again = search(source, tmp_path / "state")[1]
    assert path_of(again) == path_of(found)
    assert again["compressions"] == 0


@pytest.mark.parametrize("other", ["seed", "recipe", "calibration", "form"])
def test_the_file_of_another_run_is_said_to_be_and_left_aside(
    source: Path, tmp_path: Path, found: dict, other: str
) -> None:
    file, told = tmp_path / "state", StringIO()
    if other == "form":
        file.write_text("{")
    else:
        engine = opened(source)
        changed = Recipe.from_tree(tree(moves=2), "annealed") if other == "recipe" else RECIPE
        if other == "calibration":
            engine = Recompression(engine.model, TOKENS.flip(0), 0.3)
        Annealing(changed, engine, int(other == "seed"), file).run()
    figures = Annealing(RECIPE, opened(source), 0, file, Progress(stream=told)).run()[1]
    assert f"belongs to another run (another {other}" in told.getvalue()
    assert path_of(figures) == path_of(found)


def test_the_terminal_says_the_budget_before_and_every_move(source: Path, tmp_path: Path) -> None:
    told = StringIO()
    Annealing(RECIPE, opened(source), 0, tmp_path / "state", Progress(stream=told)).run()
    lines = told.getvalue().splitlines()
    assert f"{MOVES} moves" in lines[0] and f"at most {MOVES + 1} compressions" in lines[0]
    estimate = next(i for i, line in enumerate(lines) if "moves take at most" in line)
    moves = [i for i, line in enumerate(lines) if line.startswith("move ")]
    assert len(moves) == MOVES and estimate < moves[0]
    assert "T 300" in lines[moves[0]] and "current" in lines[moves[0]] and "best" in lines[moves[0]]


def test_a_run_writes_what_it_would_with_the_ratios_given_by_hand(source: Path, rows: Path, tmp_path: Path) -> None:
    report = compress(source, RECIPE, tmp_path / "annealed", options(rows))
    ratios = report.search["best"]["ratios"]
    by_hand = Recipe.from_tree(tree(), "by hand", ["clip.search=closed-form", "clip.moves=50",
                                                   "clip.temperature_end=10", f"clip.ratios={ratios}"])  # fmt: skip
    compress(source, by_hand, tmp_path / "by-hand", options(rows))
    assert weights(tmp_path / "annealed") == weights(tmp_path / "by-hand")
    figures = [group.figures["clip_ratio"] for block in report.blocks for group in block.groups]
    per_block = len(figures) // BLOCKS
    assert figures == [ratio for ratio in ratios for _ in range(per_block)]
    saved = Report.from_json((tmp_path / "annealed" / "report.json").read_text(encoding="utf-8"))
    assert saved.search["moves"] == report.search["moves"] and len(saved.search["moves"]) == MOVES
    assert "annealed in 6 moves" in report.table()
    assert not folder_of(tmp_path / "annealed").exists()


def test_an_interrupted_run_leaves_no_folder_and_goes_on(
    source: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Interrupted, "at", 4)
        patched.setattr("llmcompress.run.Recompression", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(source, RECIPE, output, options(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    report = compress(source, RECIPE, output, options(rows), resume=True)
    assert report.search["resumed_after"] == 3
    compress(source, RECIPE, tmp_path / "whole", options(rows))
    assert weights(output) == weights(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_the_plan_says_what_a_search_takes(source: Path, rows: Path) -> None:
    searched = api.plan(source, RECIPE, options=options(rows))
    plain = api.plan(source, with_ratios(RECIPE, [0, 0, 0]), options=options(rows))
    assert any(f"at most {MOVES + 1} compressions" in note for note in searched.notes)
    assert searched.peak_memory_bytes > plain.peak_memory_bytes


def test_the_paper_s_schedule_has_200_moves() -> None:
    clip = Clip(search="annealing")
    assert temperatures(clip) == [300, 150, 50, 12.5]
    assert clip.moves * len(temperatures(clip)) == 200


@pytest.mark.parametrize(("rise", "temperature"), [(0.01, 300), (0.2, 300), (0.01, 12.5), (1e-4, 12.5)])
def test_a_rise_of_perplexity_is_accepted_with_the_paper_s_probability(rise: float, temperature: float) -> None:
    drawn = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    share = sum(accepts(10.0, 10.0 + rise, temperature, number) for number in drawn) / len(drawn)
    assert share == pytest.approx(math.exp(-1500 * rise / temperature), abs=0.03)
    assert all(accepts(10.0, 10.0 - rise, temperature, number) for number in drawn)
    assert not accepts(10.0, math.inf, temperature, 0.0)


def test_a_chain_reads_back_as_it_was(found: dict) -> None:
    chain = Chain(found["start"]["ratios"], math.inf)
    for move in found["moves"]:
        chain.take(*(move[key] for key in ("temperature", "block", "ratio", "perplexity", "accepted")))
    again = Chain.from_tree(json.loads(json.dumps(chain.to_tree())))
    assert again.to_tree() == chain.to_tree()
    assert (again.ratios, again.best_ratios, again.best) == (chain.ratios, chain.best_ratios, chain.best)


@pytest.mark.parametrize(("rows", "share"), [(2, 0.25), (6, 0.3), (64, 0.25), (5, 0.99)])
def test_validation_rows_are_spread_evenly_and_leave_some(rows: int, share: float) -> None:
    held = held_back(rows, share)
    assert held == sorted(set(held)) and held[0] >= 0 and held[-1] < rows
    assert len(held) == min(max(1, round(rows * share)), rows - 1)
    gaps = [b - a for a, b in pairwise(held)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_one_row_cannot_both_calibrate_and_judge() -> None:
    with pytest.raises(UserError, match="rows to judge on"):
        held_back(1, 0.25)


@pytest.mark.parametrize(
    "given",
    [{"candidates": (0.1, 0.1)}, {"moves": 0}, {"temperature_start": 5.0}, {"temperature_end": 0.0},
     {"validation": 1.0}, {"ratios": (1.0,)}],
)  # fmt: skip
def test_an_annealing_that_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Clip(search="annealing", **given)


def test_no_option_of_annealing_is_ignored_without_it() -> None:
    with pytest.raises(UserError, match="only annealing reads it"):
        Clip(moves=5)


def test_ratios_must_be_one_per_block_and_a_walk_alone_does_not_search(
    source: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="2 clip ratios for 3 blocks"):
        compress(source, with_ratios(RECIPE, [0, 0]), tmp_path / "out", options(rows))
    engine = opened(source)
    with pytest.raises(UserError, match="annealing comes before the walk"):
        engine.attempt(RECIPE)
