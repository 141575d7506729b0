"""How sparse each decoder block should be, at the same number of zeros, so that the model loses least.

Each block is pruned alone, to a ratio below the wanted one and to one above it, and the KL divergence of the whole
model from the dense one is taken on calibration rows that the pruning does not see. Between them log KL is straight in
the ratio, and what blocks cost adds up while it is small:

    KL_b(r) ≈ exp(c_b + k_b r)      Σ_b KL_b(r_b) is least where one more zero costs the same in every block,
                                    k_b exp(c_b + k_b r_b) = λ n_b,    with Σ_b n_b r_b = r Σ_b n_b for n_b weights

One pass over the model for each of the two ratios, with one block in memory: the dense model and those with one pruned
block go through it side by side, L²/2 times the validation rows through a block for L blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from llmcompress.core.sparsity import Sparsity
from llmcompress.evaluate.divergence import Comparison
from llmcompress.evaluate.stream import LOGITS
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe, Stage
from llmcompress.recompress import held_back
from llmcompress.rehearsal import spans
from llmcompress.suspend import Returns, SuspendedForward, gates
from llmcompress.walk import CompressedBlock, Walk

#: how far from the wanted ratio the blocks' own may go; they are measured half as far from it
LIMIT = 0.2
#: share of the rows that judges, up to so many tokens
HELD, HELD_TOKENS = 0.25, 2048
#: decimals of a ratio: what is beyond them is noise
DECIMALS = 4


def unsettled(recipe: Recipe) -> Stage | None:
    """The first stage that leaves the blocks' ratios to be found; None if none does."""
    return next((s for s in recipe.stages if isinstance(s.method, SparseGPT) and s.method.ratios == "auto"), None)


def settled(recipe: Recipe, ratios: Sequence[float]) -> Recipe:
    """The recipe with these ratios where they were left to be found."""
    stages = []
    for stage in recipe.stages:
        if isinstance(stage.method, SparseGPT) and stage.method.ratios == "auto":
            method = replace(stage.method, ratios=tuple(ratios))
            stage = replace(stage, method=method, options=stage.options | {"ratios": list(ratios)})
        stages.append(stage)
    return replace(recipe, stages=tuple(stages))


def find_ratios(
    recipe: Recipe, model: BlockwiseModel, tokens: Tensor, progress: Progress, replay: bool = False
) -> dict[str, Any]:
    """Measures the blocks and shares the zeros out.

    Args:
        recipe: with one stage that is `unsettled`.
        model: dense, its blocks not loaded.
        tokens: (N, T) calibration rows; N ≥ 2.
        progress: told of every block.
        replay: as `Walk` takes it.

    Returns:
        ``ratios``, one per block, and how they were found, for the report.

    Raises:
        UserError: there are fewer than two rows.
    """
    began, stage = time.perf_counter(), unsettled(recipe)
    assert stage is not None and isinstance(stage.method, SparseGPT)
    sparsity = stage.method.sparsity.ratio
    limit = min(LIMIT, sparsity / 2, (1 - sparsity) / 2)
    tried = (sparsity - limit / 2, sparsity + limit / 2)
    held = held_back(len(tokens), judging_tokens(tokens.numel()) / tokens.numel())
    sensitivity = Sensitivity(model, tokens, held, replay)
    plain = replace(stage.method, refit=False, grow=0, target="compressed", ratios=(), ramp=0.0)
    with progress.phase("measuring the blocks' sensitivity", 2 * len(model.blocks), "block") as advance:
        found = [
            sensitivity.costs(replace(recipe, stages=(_pruning(plain, ratio),), propagate="dense"), advance)
            for ratio in tried
        ]
    costs = np.array(found).T  # (blocks, 2)
    shares = np.array([last - first for first, last in spans(model, recipe.sparing(model.routers).targets)])
    return {
        "sparsity": sparsity,
        "ratios": [round(ratio, DECIMALS) for ratio in allot(costs, tried, sparsity, shares, limit)],
        "tried": list(tried),
        "kl": costs.tolist(),
        "rows": len(tokens),
        "validation_rows": held,
        "seconds": time.perf_counter() - began,
    }


def judging_tokens(tokens: int) -> int:
    """About how many of the calibration tokens judge."""
    return min(round(HELD * tokens), HELD_TOKENS)


class Sensitivity:
    """What a model loses if one of its blocks is compressed.

    Args:
        model: dense, its blocks not loaded.
        tokens: (N, T) rows.
        held: numbers of those that judge; the others calibrate.
        replay: as `Walk` takes it.
    """

    def __init__(self, model: BlockwiseModel, tokens: Tensor, held: Sequence[int], replay: bool = False) -> None:
        self.model, self.judge, self._replay = model, model.twin(), replay
        judges = torch.zeros(len(tokens), dtype=torch.bool)
        judges[list(held)] = True
        vocabulary = model.model.get_output_embeddings().weight.shape[0]
        self.calibration = tokens[~judges]
        self.validation = micro_batches(tokens[judges], limit=min(4096, LOGITS // vocabulary))

    @torch.no_grad()
    def costs(self, recipe: Recipe, advance: Callable[[int], None] = lambda steps: None) -> list[float]:
        """KL(dense ‖ model with this block alone compressed) of every block, nats per token.

        Args:
            recipe: its tokens go on through the dense model.
            advance: told 1 for every block.
        """
        judge, last = self.judge, len(self.model.blocks) - 1
        blocks = [block.module for block in judge.blocks]
        alone: list[list[SuspendedForward]] = []
        with gates(blocks), Returns(blocks, copied=False) as returned:
            dense = judge.start_forwards(self.validation, head=True)
            entered: list[Any] = [None] * len(dense)
            for index, finished in enumerate(Walk(self.model, recipe, self.calibration, replay=self._replay).run()):
                alone.append(judge.start_forwards(self.validation, head=True))
                if index:
                    for forward, value in zip(alone[-1], entered, strict=True):
                        forward.skip(index, value)
                if index < last:
                    judge.load_block(index)
                    _resume(dense, *alone[:-1])
                    judge.fill_block(index, finished.tensors, finished.schemes)
                    _resume(alone[-1])
                    entered = returned.take(dense)
                    for forwards in alone:  # nobody asks for theirs, and they are large
                        returned.take(forwards)
                else:
                    costs = self._judged(finished, dense, alone)
                judge.release_block(index)
                advance(1)
        return costs

    def _judged(
        self, finished: CompressedBlock, dense: list[SuspendedForward], alone: list[list[SuspendedForward]]
    ) -> list[float]:
        """Through the last block and the head, the logits of one micro-batch and two models at a time."""
        judge, last = self.judge, len(alone) - 1
        comparisons = [Comparison() for _ in alone]
        for batch, tokens in enumerate(self.validation):
            judge.load_block(last)
            logits = _logits(dense[batch])
            for number, forwards in enumerate(alone):
                if number == last:
                    judge.fill_block(last, finished.tensors, finished.schemes)
                comparisons[number].update(logits, _logits(forwards[batch]), tokens.to(logits.device))
        return [comparison.result().kl_divergence for comparison in comparisons]


def allot(
    costs: np.ndarray, tried: tuple[float, float], sparsity: float, shares: np.ndarray, limit: float = LIMIT
) -> list[float]:
    """The blocks' ratios at which a further zero costs the same in each.

    Args:
        costs: (blocks, 2) divergences at the two ratios that were ``tried``.
        sparsity: mean of the ratios, weighted by ``shares``.
        shares: (blocks,) of all weights; blocks without any keep the mean.
        limit: how far from it they may go.
    """
    log_cost = np.log(np.maximum(costs, 1e-12))
    slope = np.maximum(np.diff(log_cost)[:, 0] / (tried[1] - tried[0]), 1e-3)
    # of one zero, at the ratio 0: log(k_b exp(c_b) / n_b)
    price = np.log(slope) + log_cost[:, 0] - slope * tried[0] - np.log(np.maximum(shares, 1e-12))

    def ratios(log_price: float) -> np.ndarray:
        return np.clip((log_price - price) / slope, sparsity - limit, sparsity + limit)

    def excess(log_price: float) -> float:
        return float(shares @ ratios(log_price)) - sparsity * float(shares.sum())

    ends = price + slope * (sparsity + np.array([[-limit], [limit]]))
    return [float(r) for r in ratios(brentq(excess, float(ends.min()), float(ends.max())))]


def _pruning(method: SparseGPT, ratio: float) -> Stage:
    return Stage("prune", "sparsegpt", replace(method, sparsity=Sparsity(ratio)), {"sparsity": ratio})


def _resume(*models: list[SuspendedForward]) -> None:
    for forwards in models:
        for forward in forwards:
            forward.resume()


def _logits(forward: SuspendedForward) -> Tensor:
    """Of a forward that waits at the last block; it keeps them no longer."""
    forward.resume()
    logits, forward.result = forward.result, None
    return logits
