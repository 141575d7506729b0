"""How sparse each decoder block should be, at the same number of zeros, so that the model loses least.

Each block is pruned alone, to a ratio below the wanted one and to one above it, and the KL divergence of the whole
model from the dense one is taken on calibration rows that the pruning does not see. Between them log KL is straight in
the ratio, and what blocks cost adds up while it is small:

    KL_b(r) ≈ exp(c_b + k_b r)      Σ_b KL_b(r_b) is least where one more zero costs the same in every block,
                                    k_b exp(c_b + k_b r_b) = λ n_b,    with Σ_b n_b r_b = r Σ_b n_b for n_b weights

`llmcompress.alone` measures that, in one pass over the model for each of the two ratios."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import brentq

from llmcompress.alone import Sensitivity
from llmcompress.core.sparsity import Sparsity
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe, Stage

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


def find_ratios(recipe: Recipe, engine: Sensitivity, progress: Progress) -> dict[str, Any]:
    """Measures the blocks and shares the zeros out.

    Args:
        recipe: with one stage that is `unsettled`.
        engine: measures.
        progress: told of every block.

    Returns:
        ``ratios``, one per block, and how they were found, for the report.
    """
    began, stage = time.perf_counter(), unsettled(recipe)
    assert stage is not None and isinstance(stage.method, SparseGPT)
    sparsity = stage.method.sparsity.ratio
    limit = min(LIMIT, sparsity / 2, (1 - sparsity) / 2)
    tried = (sparsity - limit / 2, sparsity + limit / 2)
    plain = replace(stage.method, refit=False, grow=0, target="compressed", ratios=(), ramp=0.0)
    with progress.phase("measuring the blocks' sensitivity", 2 * engine.number_of_blocks, "block") as advance:
        found = [
            engine.costs(replace(recipe, stages=(_pruning(plain, ratio),), propagate="dense"), advance)
            for ratio in tried
        ]
    costs = np.array(found).T  # (blocks, 2)
    ratios = allot(costs, tried, sparsity, np.array(engine.shares(recipe)), limit)
    return {
        "sparsity": sparsity,
        "ratios": [round(ratio, DECIMALS) for ratio in ratios],
        "tried": list(tried),
        "kl": costs.tolist(),
        "rows": engine.rows,
        "validation_rows": engine.held,
        "seconds": time.perf_counter() - began,
    }


def judging_share(tokens: int) -> float:
    """Of so many calibration tokens, those that judge."""
    return min(HELD, HELD_TOKENS / tokens)


def allot(
    costs: np.ndarray, tried: tuple[float, float], sparsity: float, shares: np.ndarray, limit: float = LIMIT
) -> list[float]:
    """The blocks' ratios at which a further zero costs the same in each.

    Args:
        costs: (blocks, 2) divergences at the two ratios that were ``tried``.
        sparsity: mean of the ratios, weighted by ``shares``.
        shares: (blocks,) of all weights; what a block without any gets counts for nothing.
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
