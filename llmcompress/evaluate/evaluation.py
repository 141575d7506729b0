"""An evaluation: a model, alone or beside a reference, on texts and on lm-eval's tasks.

Everything that can be refused is refused before the first forward. Texts go through both models block by block, in
turns; tasks need a whole model in memory, one at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcompress.errors import UserError, nearest
from llmcompress.evaluate.accuracy import TaskQuality, task_qualities
from llmcompress.evaluate.judged import SIMULATED, Judged
from llmcompress.evaluate.predictions import Scores
from llmcompress.evaluate.quality import TextQuality, text_quality
from llmcompress.evaluate.result import Evaluation, JudgedModel
from llmcompress.evaluate.stream import LOGITS
from llmcompress.evaluate.tasks import data_hashes, parse_tasks
from llmcompress.evaluate.texts import EvalText, Windowing, document_ids, folder_hashes, prefix_token
from llmcompress.evaluate.windows import KINDS, Window, batches_of
from llmcompress.measure import Phases, peak_memory_bytes, versions
from llmcompress.progress import Progress
from llmcompress.sampling import check_length

#: tokens per window, as `compress` evaluates with; the papers on compression take 2048
LENGTH = 512
#: the longest input of a task, where the model takes as much
TASK_LENGTH = 4096


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate on, and how.

    Attributes:
        texts: files; a plain one is one document, ``.jsonl`` has one per line.
        tasks: ``NAME``, ``NAME=FILE`` or ``FILE.yaml``, as lm-eval and ``eval/`` know them.
        limit: only the first items of each task and windows of each text; all if None.
        length: tokens per window, and the longest input of a task; if None 512, and what the model takes up to 4096.
        stride: tokens predicted per window; ``length`` if None.
        windows: ``rolling`` or ``rows`` (`llmcompress.evaluate.windows`).
        seed: of the bootstrap, the permutations, and of lm-eval.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the arithmetic: ``auto``, ``float32`` or ``bfloat16``.
        runtime: ``simulated``, or what `llmcompress.load` shall multiply with; the reference is always simulated.
        trust_remote_code: run code that came with the checkpoint.
    """

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    length: int | None = None
    stride: int | None = None
    windows: str = "rolling"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    runtime: str = SIMULATED
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.texts and not self.tasks:
            raise UserError("nothing to evaluate on", "--text, --tasks", "give --text FILE, --tasks NAME, or both")
        for key, known in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("windows", KINDS),
        ):
            if getattr(self, key) not in known:
                raise UserError(f"unknown '{getattr(self, key)}'", f"--{key}", nearest(getattr(self, key), known))
        for key, least in (("limit", 1), ("length", 2), ("stride", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"is {value}", f"--{key}", f"use {least} or more")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative", "--seed", "use 0 or more")
        if self.stride is not None and self.stride > (self.length or LENGTH):
            raise UserError(
                f"{self.stride} is more than a window's {self.length or LENGTH} tokens", "--stride",
                "use at most --length: tokens between two windows would not be predicted",
            )  # fmt: skip
        if self.stride is not None and self.windows == "rows":
            raise UserError("rows do not overlap", "--stride", "leave it out, or use --windows rolling")


class EvaluationRun:
    """One evaluation, checked when it is made.

    Raises:
        UserError: a model, a text, a task, or what does not belong together.
    """

    def __init__(self, model: str | Path, reference: str | Path | None, options: EvalOptions) -> None:
        o = self.options = options
        self.phases = Phases()
        with self.phases("load"):
            self.texts = [EvalText.read(path) for path in dict.fromkeys(o.texts)]
            wanted = parse_tasks(o.tasks)
            self.model = Judged(model, o.device, o.dtype, o.runtime, o.trust_remote_code)
            self.models = [self.model]
            if reference is not None:
                self.models.append(Judged(reference, o.device, o.dtype, SIMULATED, o.trust_remote_code))
                _check_pair(*self.models)
            self.positions = min((m.positions for m in self.models if m.positions is not None), default=None)
            if o.length is not None:
                for judged in self.models:
                    check_length(judged.config, o.length)
            self.windowing = self._windowing() if self.texts else None
            self.data = data_hashes(wanted)
            self.tasks: list[Any] = []
            self._manager: Any = None
            if wanted:
                from llmcompress.evaluate.catalogue import load_tasks

                self.tasks, self._manager = load_tasks(wanted)

    def execute(self, progress: Progress, command: str = "") -> Evaluation:
        """Runs the models and puts the figures together."""
        texts = [self._text(text, progress) for text in self.texts]
        tasks: list[TaskQuality] = []
        if self.tasks:
            with self.phases("tasks"):
                found = [self._tasks(judged, progress) for judged in self.models]
                tasks = task_qualities(found[0], found[1] if len(found) > 1 else None, self.options.seed)
        with self.phases("hash"):
            records = [_record(judged) for judged in self.models]
        return Evaluation(
            model=records[0],
            reference=records[1] if len(records) > 1 else None,
            options=asdict(self.options),
            windowing=None if self.windowing is None else self.windowing.describe(),
            task_length=self._task_length if self.tasks else None,
            texts=texts,
            tasks=tasks,
            data=self.data,
            versions=versions() | _harness_version(bool(self.tasks)),
            command=command,
            seconds=self.phases.total,
            seconds_by_phase=self.phases.seconds,
            peak_memory_bytes=peak_memory_bytes(self.model.device),
        )

    @property
    def _task_length(self) -> int:
        return self.options.length or min(TASK_LENGTH, self.positions or TASK_LENGTH)

    def _windowing(self) -> Windowing:
        o, tokenizer = self.options, self.model.tokenizer
        length = o.length or min(LENGTH, self.positions or LENGTH)
        prefix = prefix_token(tokenizer) if o.windows == "rolling" else None
        shown = None if prefix is None else str(tokenizer.convert_ids_to_tokens(prefix))
        return Windowing(o.windows, length, min(o.stride or length, length), prefix, shown)

    def _text(self, text: EvalText, progress: Progress) -> TextQuality:
        assert self.windowing is not None
        with self.phases("texts"):
            windows, document_of = self._windows(text, self.windowing)
            scores = Scores(windows)
            batches = batches_of(windows, min(4096, max(1, LOGITS // self.model.vocabulary)))
            inputs = [torch.stack([windows[i].inputs for i in batch]) for batch in batches]
            steps = len(batches) * sum(judged.steps for judged in self.models)
            with progress.phase(Path(text.path).name, steps, "step") as advance:
                lanes = [judged.logits(inputs, advance) for judged in self.models]
                for batch, *logits in zip(batches, *lanes, strict=True):
                    scores.update(batch, *logits)
        with self.phases("statistics"):
            complete = self.options.limit is None or len(windows) < self.options.limit
            return text_quality(
                text, self.windowing, np.array(document_of), scores.result(), self.options.seed, complete
            )

    def _windows(self, text: EvalText, windowing: Windowing) -> tuple[list[Window], list[int]]:
        """The windows of a text, and the document of each."""
        windows: list[Window] = []
        document_of: list[int] = []
        for number, document in enumerate(text.documents):
            ids = document_ids(document, self.model.tokenizer)
            if ids and max(ids) >= self.model.vocabulary:
                raise UserError(
                    f"the tokenizer gives token {max(ids)}, the model knows {self.model.vocabulary}",
                    str(self.model.folder), "give the tokenizer that belongs to the model",
                )  # fmt: skip
            found = windowing.windows_of(ids)
            windows += found
            document_of += [number] * len(found)
        if not windows:
            raise UserError("has no token to predict", text.path, "give a longer text or a smaller --length")
        limit = self.options.limit
        return windows[:limit], document_of[:limit]

    def _tasks(self, judged: Judged, progress: Progress) -> dict[str, Any]:
        from llmcompress.evaluate.harness import run_tasks

        with judged.whole() as model:
            return run_tasks(
                model, judged.tokenizer, self.tasks, self._manager,
                limit=self.options.limit, max_length=self._task_length, seed=self.options.seed,
                progress=progress, name=judged.name,
            )  # fmt: skip


def _check_pair(model: Judged, reference: Judged) -> None:
    """Refuses a reference whose predictions are over other tokens."""
    where = f"--reference {reference.name}"
    if reference.vocabulary != model.vocabulary:
        raise UserError(
            f"predicts {reference.vocabulary} tokens, {model.name} {model.vocabulary}", where,
            "give the dense model that it was made from",
        )  # fmt: skip
    if reference.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise UserError(
            f"its tokenizer knows other tokens than that of {model.name}", where,
            "give the dense model that it was made from",
        )  # fmt: skip


def _record(judged: Judged) -> JudgedModel:
    dtype = str(judged.dtype).removeprefix("torch.")
    size = judged.checkpoint.size_bytes
    return JudgedModel(judged.name, judged.runtime, judged.device, dtype, size, folder_hashes(judged.folder))


def _harness_version(used: bool) -> dict[str, str]:
    if not used:
        return {}
    import lm_eval

    return {"lm-eval": lm_eval.__version__}
