"""lm-eval's tasks on a model in memory, through its Python API.

Requests are batched by what fits, not by a fixed number: sequences come sorted by length, and a batch holds as many as
``LOGITS`` allows of the longest."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.progress import Progress

#: logits of one batch held at a time
LOGITS = 2**26
_MAX_BATCH = 64


class HarnessModel(HFLM):
    """lm-eval's wrapper around a transformers model that is in memory already, quiet, with batches of its own.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        max_length: longest input; the model's positions if None.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size="auto", max_length=max_length
        )
        self.advance: Callable[[int], None] = lambda sequences: None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        self.advance(len(inps))
        return logits

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """As many sequences as fit, if they are as long as the one at ``pos``; as long as possible without one."""
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        return max(1, min(_MAX_BATCH, LOGITS // (length * self.vocab_size)))

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        return self._detect_batch_size(n_reordered_requests, pos)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[Any],
    manager: Any,
    *,
    limit: int | None,
    max_length: int | None,
    seed: int,
    progress: Progress,
    name: str,
) -> dict[str, Any]:
    """lm-eval's results with the samples of every task.

    Args:
        tasks: task and group objects, as `llmcompress.evaluate.catalogue.load_tasks` gives them.
        limit: items per task, from the first; all if None.
        name: of the model, for the progress bar.
    """
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        wrapped = HarnessModel(model, tokenizer, max_length)
    with progress.phase(f"tasks, {name}", None, "sequence") as advance, torch.no_grad():
        wrapped.advance = advance
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            found = simple_evaluate(
                model=wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
    assert found is not None  # only other processes than the first get None
    return dict(found)
