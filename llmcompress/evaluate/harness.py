"""lm-eval's tasks on a model in memory, through its Python API: what its ``simple_evaluate`` does, less the report on
the machine, for which it starts other programs.

Requests are batched by what fits, not by a fixed number: sequences come sorted by length, and a batch holds as many as
``LOGITS`` allows of the longest."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.progress import Advance, Progress

#: logits of one batch held at a time
LOGITS = 2**26
_MAX_BATCH = 128


class HarnessModel(HFLM):
    """lm-eval's wrapper around a transformers model that is in memory already, with batches and progress of its own.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        max_length: longest input; the model's positions if None.
        progress: where sequences are counted.
        name: of the model, for the progress bar.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, max_length: int | None, progress: Progress, name: str
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size="auto", max_length=max_length
        )
        self._progress, self._name = progress, name
        self._advance: Advance = lambda sequences: None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations."""
        with self._counted("choices", len(requests)):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts."""
        with self._counted("texts", None):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
            return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations."""
        with self._counted("answers", None):
            found: list[str] = super().generate_until(requests, disable_tqdm=True)
            return found

    @contextmanager
    def _counted(self, what: str, total: int | None) -> Iterator[None]:
        with self._progress.phase(f"{self._name}, {what}", total, "sequence") as advance:
            self._advance = advance
            yield

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        self._advance(len(inps))
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
        manager: that loaded them.
        limit: items per task, from the first; all if None.
        max_length: longest input, in tokens; the model's positions if None.
        seed: of the examples in prompts, and of whatever a task draws.
        name: of the model, for the progress bar.
    """
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    quiet = io.StringIO()  # lm-eval's own bars and warnings
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet), torch.no_grad():
        wrapped = HarnessModel(model, tokenizer, max_length, progress, name)
        found = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None  # only other processes than the first get None
    return dict(found)
