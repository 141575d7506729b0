"""An evaluation as tables for a terminal."""

from __future__ import annotations

from pathlib import Path

from llmcompress.evaluate.accuracy import TaskQuality
from llmcompress.evaluate.quality import Beside, Estimate, Part, TextQuality
from llmcompress.evaluate.result import Evaluation
from llmcompress.progress import seconds_text
from llmcompress.table import aligned, bytes_text, figure


def evaluation_table(found: Evaluation) -> str:
    """Headline, a table per text, one of the tasks, and how it was measured."""
    parts = [_headline(found)]
    parts += [_text_table(text) for text in found.texts]
    parts += [_task_table(found.tasks)] if found.tasks else []
    parts.append("\n".join(_notes(found)))
    return "\n\n".join(parts)


def _headline(found: Evaluation) -> str:
    model = found.model
    size = f"{bytes_text(model.parameters_bytes)} of weights, {model.runtime}, {model.dtype} on {model.device}"
    line = f"{model.name}: {size}"
    if found.reference is not None:
        line += f"\nagainst {found.reference.name}: {bytes_text(found.reference.parameters_bytes)} of weights"
    return line


def _text_table(text: TextQuality) -> str:
    beside = text.beside
    head = f"{Path(text.text).name}, {text.tokens} tokens in {text.windows} windows"
    rows = [_head(head, beside is not None)]
    reference = None if beside is None else beside.reference
    for name, ours, theirs in (
        ("perplexity per token", text.perplexity.token, None if reference is None else reference.token),
        ("perplexity per word", text.perplexity.word, None if reference is None else reference.word),
        ("perplexity per byte", text.perplexity.byte, None if reference is None else reference.byte),
    ):
        if ours is not None:
            rows.append(_perplexity_row(name, ours, theirs, beside))
    if beside is not None:
        rows.append(
            ["KL divergence, nats per token", f"{beside.kl.value:.5f}", _interval(beside.kl, ".5f"), "", "", "", ""]
        )
        for name, share in (("top-1 agreement", beside.top1), ("top-5 agreement", beside.top5)):
            rows.append([name, f"{share.value:.1%}", _interval(share, ".1%"), "", "", "", ""])
    lines = [
        aligned(rows),
        _parts_table("by context", text.by_context),
        _parts_table("by frequency", text.by_frequency),
    ]
    return "\n\n".join(line for line in lines if line)


def _head(first: str, compared: bool) -> list[str]:
    return [first, "value", "95 % interval", *(["reference", "change", "p", ""] if compared else [])]


def _perplexity_row(name: str, ours: Estimate, theirs: Estimate | None, beside: Beside | None) -> list[str]:
    row = [name, f"{ours.value:.3f}", _interval(ours, ".3f")]
    if theirs is None or beside is None:
        return row
    return [*row, f"{theirs.value:.3f}", f"{ours.value / theirs.value - 1:+.2%}", p_text(beside.p), beside.verdict]


def _parts_table(title: str, parts: list[Part]) -> str:
    if len(parts) < 2:
        return ""
    compared = parts[0].reference_perplexity is not None
    rows = [[title, "tokens", "perplexity", *(["reference", "change", "KL"] if compared else []), ""]]
    for part in parts:
        row = [f"  {part.name}", str(part.tokens), f"{part.perplexity:.3f}"]
        if part.reference_perplexity is not None:
            change = part.perplexity / part.reference_perplexity - 1
            row += [f"{part.reference_perplexity:.3f}", f"{change:+.2%}", figure(part.kl, ".5f")]
        rows.append([*row, ""])
    return aligned(rows)


def _task_table(tasks: list[TaskQuality]) -> str:
    compared = any(row.beside is not None for row in tasks)
    columns = ["items", "metric", "value", "95 % interval"]
    rows = [["task", *columns, *(["reference", "difference", "p", ""] if compared else [""])]]
    for row in tasks:
        if row.level == "member":
            continue
        name = f"  {row.task}" if row.level == "part" else row.task
        share = row.metric.partition(",")[0] in ("acc", "acc_norm", "exact_match", "f1", "mcc")
        spec = ".1%" if share else ".4f"
        cells = [name, str(row.items), row.metric, format(row.value.value, spec), _interval(row.value, spec)]
        if not compared:
            rows.append([*cells, ""])
        elif (b := row.beside) is not None:
            difference = f"{100 * b.difference:+.1f} pp" if share else f"{b.difference:+.4f}"
            rows.append([*cells, format(b.reference, spec), difference, p_text(b.p_adjusted), b.verdict])
    hidden = sum(row.level == "member" for row in tasks)
    return aligned(rows) + (f"\n({hidden} figures of tasks inside groups are in --json)" if hidden else "")


def _notes(found: Evaluation) -> list[str]:
    lines = []
    o = found.options
    if found.windowing is not None:
        lines.append(f"texts: {found.windowing}")
    if found.tasks:
        lines.append(
            f"tasks: lm-eval {found.versions.get('lm-eval', '')}, inputs of at most {found.task_length} tokens"
        )
    if o["limit"] is not None:
        lines.append(
            f"limited to the first {o['limit']} windows of a text and items of a task: not comparable with whole ones"
        )
    ways = [f"bootstrap over {unit}s, seed {o['seed']}" for unit in sorted({text.unit for text in found.texts})]
    ways += ["Wilson's for accuracies"] if found.tasks else []
    lines.append(f"intervals: {'; '.join(ways)}")
    if found.reference is not None:
        tests = ["a paired permutation test for perplexity"] if found.texts else []
        tests += ["McNemar's for accuracies, adjusted by Holm"] if found.tasks else []
        lines.append(f"p: {', '.join(tests)}; within noise: p of 0.05 or more")
    spent = ", ".join(f"{name} {value:.1f}" for name, value in found.seconds_by_phase.items())
    lines.append(f"{seconds_text(found.seconds)} ({spent}), peak memory {bytes_text(found.peak_memory_bytes)}")
    return lines


def _interval(estimate: Estimate, spec: str) -> str:
    if estimate.low is None or estimate.high is None:
        return "-"
    return f"{estimate.low:{spec}} to {estimate.high:{spec}}"


def p_text(p: float | None) -> str:
    """``0.013``, ``<0.0001``, or a dash where nothing was tested."""
    return "-" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"
