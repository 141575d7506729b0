"""What an evaluation found, as it is saved and shown.

``Evaluation.to_json`` is one object; figures that are no finite number are null:

    model, reference      {name, runtime, device, dtype, parameters_bytes, sha256: {file: hash}}; reference may be null
    options               what was asked for: texts, tasks, limit, length, stride, windows, seed
    windowing             how texts were cut, in words; task_length: the longest input of a task
    texts                 a list of
        text, sha256, tokens, documents, windows, words, bytes, windowing, unit
        perplexity        {token, word, byte: {value, low, high} or null, bits_per_byte}
        beside            null without a reference, or {reference: as perplexity, ratio: {value, low, high}, p, verdict,
                          kl, top1, top5: {value, low, high}}
        by_context        a list of {name, tokens, perplexity, reference_perplexity, kl}
        by_frequency      the same
    tasks                 a list of
        task, metric, items, level, of, value: {value, low, high}, higher_is_better, shots, version
        beside            null without a reference, or {reference, difference, p, p_adjusted, test, gained, lost,
                          verdict}
    data                  {path of a task's local file: SHA-256}
    versions              {package: version}
    command, seconds, seconds_by_phase, peak_memory_bytes

``low`` and ``high`` bound the central 95 % of 2,000 bootstrap resamples, or are Wilson's interval of a share;
what the fields of texts and tasks mean is said in `llmcompress.evaluate.quality` and
`llmcompress.evaluate.accuracy`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llmcompress.evaluate.accuracy import TaskQuality
from llmcompress.evaluate.quality import TextQuality


@dataclass(frozen=True)
class JudgedModel:
    """Which model was evaluated, and how it was computed.

    Attributes:
        name: as given.
        runtime: ``simulated`` or a runtime of `llmcompress.load`.
        device, dtype: of the arithmetic.
        parameters_bytes: size of the weights on disk.
        sha256: of the weights' and JSON files, by name.
    """

    name: str
    runtime: str
    device: str
    dtype: str
    parameters_bytes: int
    sha256: dict[str, str]


@dataclass
class Evaluation:
    """The result of `llmcompress.api.evaluate`; the module's docstring has the fields."""

    model: JudgedModel
    reference: JudgedModel | None
    options: dict[str, Any]
    windowing: str | None
    task_length: int | None
    texts: list[TextQuality] = field(default_factory=list)
    tasks: list[TaskQuality] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what is no finite number becomes None."""
        content: dict[str, Any] = _finite(asdict(self))
        return content

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def table(self) -> str:
        """For a terminal."""
        from llmcompress.evaluate.show import evaluation_table

        return evaluation_table(self)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
