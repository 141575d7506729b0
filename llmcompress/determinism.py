"""Whether the same command writes the same bytes with any number of threads.

Matrix products and sums of the steps in INDEPENDENT come out the same however many threads share them, as was measured
at widths of 512 and 1408 (a test holds it for some). Others factor Gram matrices: LAPACK's Cholesky cuts a matrix
otherwise for another number of threads, and the last bits of its sums, and with them some roundings, change."""

from __future__ import annotations

import torch

from llmcompress.recipe import Recipe

#: methods whose results do not hang on the number of threads
INDEPENDENT = frozenset({"awq", "clip", "jsq", "llm-pruner", "magnitude", "omniquant", "rtn", "smoothquant", "wanda"})


def hangs_on_threads(recipe: Recipe) -> bool:
    """Whether another number of threads may give other bytes."""
    return any(stage.method_name not in INDEPENDENT for stage in recipe.stages)


def determinism(recipe: Recipe, device: str, threads: int, processes: int = 1) -> str:
    """What has to be the same for the same bytes, in one line."""
    if device != "cpu":
        return "the same bytes on the same kind of GPU with the same libraries"
    shared = f" and {processes} processes" if processes > 1 else ""
    if not hangs_on_threads(recipe) and not shared:
        return "the same bytes with any number of threads, on processors of the same kind"
    slow = sorted({stage.method_name for stage in recipe.stages} - INDEPENDENT)
    why = f": {', '.join(slow)} factors or sums in another order with others" if slow else ""
    return f"the same bytes with {threads} thread{'s' * (threads != 1)}{shared}{why}"


def arithmetic(dtype: torch.dtype, device: str, recipe: Recipe, processes: int) -> str:
    """What a run computes in, on and with, as far as its bytes hang on that."""
    parts = [f"{dtype} on {device}"]
    if device == "cpu" and hangs_on_threads(recipe):
        parts.append(f"threads: {torch.get_num_threads()}")
    if processes > 1:
        parts.append(f"processes: {processes}")
    return ", ".join(parts)
