"""Simulated annealing of JSQ's clip ratios (Guo et al., ICML 2024): one ratio per block, judged by the perplexity of
the whole compressed model on calibration rows that the compression does not see.

    a move gives one block another candidate;  accepted if Δ ≤ 0, else with probability exp(−1500 Δ / T)
    Δ the change of perplexity;  T from 300, divided by 2, 3, 4 … while T ≥ 10, 50 moves at each: 200 in all

Departures: a move compresses from the block it changes on, not the whole model; the best ratios ever seen are taken,
not the last; and once they are found, all rows calibrate the model that is written.

What is drawn for a move follows from the seed and the move's number. So the moves so far and what they found, kept in a
file while the search runs, are all that a search needs to go on after an interruption."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmcompress.chain import Chain, ChainFile, accepts
from llmcompress.errors import UserError
from llmcompress.measure import versions
from llmcompress.methods.clip import Clip
from llmcompress.progress import Progress, seconds_text
from llmcompress.recipe import Recipe
from llmcompress.recompress import Recompression
from llmcompress.table import bytes_text

#: relative difference up to which a compression that is made again is taken to be the same
_SAME = 1e-3


class Annealing:
    """One search.

    Args:
        recipe: with one clip stage that asks for it.
        engine: compresses the model and judges the result.
        seed: of all that is drawn.
        file: where it is kept how far the search is.
        progress: told of every move.

    Raises:
        UserError: several clip stages are to be searched.
    """

    def __init__(
        self, recipe: Recipe, engine: Recompression, seed: int, file: Path, progress: Progress | None = None
    ) -> None:
        clip = searched(recipe)
        assert clip is not None
        self.recipe, self.engine, self.seed, self.clip = recipe, engine, seed, clip
        self.progress = progress or Progress(silent=True)
        self.temperatures = [t for t in temperatures(clip) for _ in range(clip.moves)]
        arithmetic = {"recipe": recipe.hash, "seed": seed, "llmcompress": versions().get("llmcompress")}
        self.file = ChainFile(file, engine.identity() | arithmetic)

    def run(self) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with the best ratios found, given per block, and the figures for the report."""
        began = time.perf_counter()
        moves = len(self.temperatures)
        self.progress.say(self._budget())
        chain = self._take_up()
        resumed = len(chain.moves) if chain else 0
        if chain is None or resumed < moves:
            chain = self._begin(chain)
            resumed = len(chain.moves)
        try:
            with self.progress.phase("annealing", moves, "move") as advance:
                advance(resumed)
                for number in range(resumed, moves):
                    self._move(number, chain)
                    advance(1)
        except KeyboardInterrupt:
            done = f"{len(chain.moves)} of {moves}"
            self.progress.say(f"annealing: stopped after move {done}")
            raise
        return with_ratios(self.recipe, chain.best_ratios), self._figures(chain, resumed, time.perf_counter() - began)

    def _take_up(self) -> Chain | None:
        """The chain an interrupted search of the same run has left; None, and a line that says so, otherwise."""
        name, moves = self.file.path.name, len(self.temperatures)
        try:
            chain = self.file.read()
        except ValueError as other:
            self.progress.say(f"annealing: {name} belongs to another run (another {other}); starts from the beginning")
            return None
        if chain is not None:
            self.progress.say(f"annealing: goes on after move {len(chain.moves)} of {moves}, as {name} says")
        return chain

    def _begin(self, chain: Chain | None) -> Chain:
        """Compresses with the current ratios, those at the start or those of a search that is taken up, and says how
        long the rest may take."""
        ratios = chain.ratios if chain else list(self.clip.ratios) or self._middle()
        began = time.perf_counter()
        with self.progress.phase("compressing for the first time", 1):
            attempt = self.engine.attempt(with_ratios(self.recipe, ratios))
        seconds = time.perf_counter() - began
        if chain and not math.isclose(attempt.perplexity, chain.current, rel_tol=_SAME):
            self.progress.say("annealing: what was found before cannot be repeated here; starts from the beginning")
            return self._begin(None)
        self.engine.accept(attempt)
        left = len(self.temperatures) - (len(chain.moves) if chain else 0)
        self.progress.say(
            f"annealing: perplexity {attempt.perplexity:.4f}; that took {seconds_text(seconds)}, so {left} moves take "
            f"at most {seconds_text(left * seconds)}, about {seconds_text(self.engine.mean_share * left * seconds)}"
        )
        if chain is None:
            chain = Chain(ratios, attempt.perplexity)
            self.file.write(chain)
        return chain

    def _move(self, number: int, chain: Chain) -> None:
        drawn, temperature = random.Random(f"{self.seed}:{number}"), self.temperatures[number]
        block = drawn.randrange(len(chain.ratios))
        ratio = drawn.choice([c for c in dict.fromkeys(self.clip.candidates) if c != chain.ratios[block]])
        attempt = self.engine.attempt(with_ratios(self.recipe, chain.with_move(block, ratio)), block)
        accepted = accepts(chain.current, attempt.perplexity, temperature, drawn.random())
        if accepted:
            self.engine.accept(attempt)
        move = chain.take(temperature, block, ratio, attempt.perplexity, accepted)
        self.file.write(chain)
        self.progress.step(
            f"move {number + 1} of {len(self.temperatures)}, T {temperature:g}, block {block} at {ratio:g}: "
            f"perplexity {move.perplexity:.4f}, current {move.current:.4f}, best {move.best:.4f}"
        )

    def _middle(self) -> list[float]:
        return [self.clip.candidates[len(self.clip.candidates) // 2]] * self.engine.number_of_blocks

    def _budget(self) -> str:
        moves, engine = len(self.temperatures), self.engine
        interval = "each block" if engine.every == 1 else f"every {engine.every}th block"
        return (
            f"annealing: {moves} moves, temperature {self.temperatures[0]:g} to {self.temperatures[-1]:g}, so at most "
            f"{moves + 1} compressions of the model; judged on {len(engine.held)} of {engine.rows} calibration rows; "
            f"keeps what enters {interval}, {bytes_text(engine.kept_bytes)}"
        )

    def _figures(self, chain: Chain, resumed: int, seconds: float) -> dict[str, Any]:
        return {
            "kind": "annealing",
            "seed": self.seed,
            "rows": self.engine.rows,
            "validation_rows": self.engine.held,
            "start": {"ratios": chain.start, "perplexity": chain.perplexity},
            "best": {"ratios": chain.best_ratios, "perplexity": chain.best},
            "compressions": self.engine.runs,
            "compressed_blocks": self.engine.blocks,
            "resumed_after": resumed,
            "seconds": seconds,
            "moves": [asdict(move) for move in chain.moves],
        }


def searched(recipe: Recipe) -> Clip | None:
    """The stage of the recipe that asks for a search; None if none does.

    Raises:
        UserError: several do.
    """
    found = [m for m in recipe.methods if isinstance(m, Clip) and m.search == "annealing"]
    if len(found) > 1:
        raise UserError(f"{len(found)} clip stages are to be searched", f"recipe {recipe.name}", "leave one")
    return found[0] if found else None


def number_of_moves(recipe: Recipe) -> int:
    """Of the search that the recipe asks for; 0 if it asks for none."""
    clip = searched(recipe)
    return clip.moves * len(temperatures(clip)) if clip else 0


def with_ratios(recipe: Recipe, ratios: list[float]) -> Recipe:
    """The recipe with the ratios of its searched clip stage settled."""
    stages = []
    for stage in recipe.stages:
        if isinstance(stage.method, Clip) and stage.method.search == "annealing":
            settled = Clip(stage.method.candidates, ratios=tuple(ratios))
            options: dict[str, object] = {"candidates": list(settled.candidates), "ratios": list(ratios)}
            stage = replace(stage, method=settled, options=options)
        stages.append(stage)
    return replace(recipe, stages=tuple(stages))


def temperatures(clip: Clip) -> list[float]:
    """T ← T / (1 + t), t = 1, 2, …, from the start while it is not below the end."""
    found = [clip.temperature_start]
    while (following := found[-1] / (1 + len(found))) >= clip.temperature_end:
        found.append(following)
    return found
