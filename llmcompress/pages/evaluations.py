"""What ``python -m llmcompress eval`` found about a folder, where it was kept in it: ``evaluation.json``, as written by
``--json FOLDER/evaluation.json`` (see `llmcompress.evaluate.result`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Judgement:
    """One figure of an evaluation.

    Attributes:
        what: in words.
        same: what it hangs on but the model: two figures with the same can be compared.
        value, low, high: with its interval, where it has one.
        reference: the dense model's.
        p: of the paired test that both are the same.
        verdict: of it.
        share: whether it is a share between 0 and 1.
    """

    what: str
    same: tuple[object, ...]
    value: float
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    p: float | None = None
    verdict: str = ""
    share: bool = False

    def cells(self) -> list[str]:
        """What, value, interval, the dense model's, p, verdict."""
        interval = "" if self.low is None or self.high is None else f"{self.text(self.low)} – {self.text(self.high)}"
        dense = "" if self.reference is None else self.text(self.reference)
        p = "" if self.p is None else f"{self.p:.2g}"
        return [self.what, self.text(self.value), interval, dense, p, self.verdict]

    def text(self, value: float) -> str:
        """A value of this figure."""
        return f"{value:.1%}" if self.share else f"{value:.5f}" if abs(value) < 1 else f"{value:.3f}"


def judgements(content: dict[str, Any]) -> list[Judgement]:
    """Of the texts, then of the tasks; members and parts of a task are left out.

    Args:
        content: of `EVALUATION`.

    Raises:
        ValueError: it is not what an evaluation writes.
    """
    try:
        texts = [item for text in content["texts"] for item in _of_text(text)]
        hashes = tuple(sorted(content["data"].values()))
        limit = content["options"].get("limit")
        tasks = [_of_task(task, (limit, *hashes)) for task in content["tasks"] if task["level"] in ("task", "group")]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an evaluation of this program: {error!r}") from error
    found = [*texts, *tasks]
    if not all(isinstance(item.value, (int, float)) for item in found):
        raise ValueError("not an evaluation of this program: a figure is no number")
    return found


def limited(content: dict[str, Any]) -> str:
    """What was left out of an evaluation, in a sentence; empty if nothing was."""
    limit = content["options"].get("limit") if content else None
    return f"Only the first {limit} windows of each text and documents of each task were evaluated." if limit else ""


def _of_text(text: dict[str, Any]) -> list[Judgement]:
    same = (text["sha256"], text["windowing"], text["tokens"])
    name, beside = PurePath(text["text"]).name, text["beside"]
    found = []
    for unit in ("token", "word", "byte"):
        ours = text["perplexity"][unit]
        if ours is None or ours["value"] is None:
            continue
        theirs = None if beside is None else beside["reference"][unit]
        dense = None if theirs is None else theirs["value"]
        p, verdict = (None, "") if beside is None else (beside["p"], beside["verdict"])
        what = f"{name}: perplexity per {unit}"
        found.append(Judgement(what, (*same, unit), ours["value"], ours["low"], ours["high"], dense, p, verdict))
    for key, what in (("kl", "KL, nats per token"), ("top1", "top-1 agreement"), ("top5", "top-5 agreement")):
        if beside is not None:
            v = beside[key]
            found.append(Judgement(f"{name}: {what}", (*same, key), v["value"], v["low"], v["high"], share=key != "kl"))
    return found


def _of_task(task: dict[str, Any], data: tuple[object, ...]) -> Judgement:
    value, beside = task["value"], task["beside"] or {}
    same = (task["task"], task["metric"], task["items"], str(task["shots"]), str(task["version"]), *data)
    p = beside.get("p_adjusted") if beside.get("p_adjusted") is not None else beside.get("p")
    share = task["metric"].split(",")[0] in ("acc", "acc_norm", "exact_match", "f1", "mcc")
    return Judgement(
        f"{task['task']}: {task['metric']}, {task['items']} items", same, value["value"], value["low"], value["high"],
        beside.get("reference"), p, beside.get("verdict", ""), share,
    )  # fmt: skip
