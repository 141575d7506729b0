"""What a recipe asks for before its walk begins: statistics, calibration rows, compiled kernels."""

from __future__ import annotations

import torch

from llmcompress.core.grid import COMPILED_ENTRIES
from llmcompress.core.group import Matrix, MatrixGroup, run_methods
from llmcompress.core.kernels.gram_cpu import LEAST_WIDTH
from llmcompress.core.stats import InputStats, add_gram
from llmcompress.core.structure import StructuredMethod
from llmcompress.lane import ERROR_ROWS
from llmcompress.recipe import Recipe


def samples_needed(recipe: Recipe, samples: int, length: int) -> int:
    """How many of ``samples`` rows of ``length`` tokens a recipe uses: steps that need no statistics need no more than
    the errors are measured on."""
    return samples if needs_of(recipe) else min(samples, -(-ERROR_ROWS // length))


def first_that_reads(recipe: Recipe) -> str:
    """The first step that calibration rows are needed for, as a recipe names it; empty if there is none."""
    for stage in recipe.stages:
        method = stage.method
        if isinstance(method, StructuredMethod) or method.needs or method.learns or method.stage == "clip":
            return f"{stage.kind} ({stage.method_name})"
    return "kv_cache" if recipe.kv_cache else ""


def warm_up(recipe: Recipe, width: int, dtype: torch.dtype) -> None:
    """Runs the recipe's steps once on a few random rows and outputs, so that compiled kernels are ready (and announced
    as what they are) before the first block.

    Args:
        width: input columns, such as the recipe's patterns and groups divide.
        dtype: of the rows in the walk.
    """
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    needs = needs_of(recipe)
    if needs & {"gram", "rows"}:
        add_gram(torch.zeros(LEAST_WIDTH, LEAST_WIDTH), torch.zeros(2, LEAST_WIDTH, dtype=dtype))
    stats = InputStats(width, needs, length=16)
    stats.update(rows, rows)
    work = MatrixGroup([Matrix("warm-up", rows.to(torch.float32, copy=True))])
    run_methods(recipe.methods, work, stats)
    work.inputs_at_run_time(rows.repeat(-(-COMPILED_ENTRIES // rows.numel()), 1))


def needs_of(recipe: Recipe) -> frozenset[str]:
    """Statistics that the steps ask for, up to the first one that gathers its own."""
    needs: frozenset[str] = frozenset()
    for method in recipe.methods:
        needs |= method.needs
        if method.stage == "clip":
            break
    return needs
