"""Which results can be compared, and which of them are not beaten: the Pareto frontier.

Results are compared only if they were judged on the same tokens by the distance from the same dense model. The hash of
the tokens tells the first where a report has it, else their source, number, length and seed. Of the second, the size of
the dense weights and its perplexity on those tokens tell: one that is another by more than 0.1 % is another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pages.results import SPEEDS, Result
from llmcompress.report import Report
from llmcompress.table import bytes_text, figure, rows_text

#: relative difference of the dense perplexity up to which two runs had the same dense model
SAME = 1e-3


@dataclass(frozen=True)
class Axis:
    """What is paid against the divergence; less is better.

    Attributes:
        key: ``size``, ``nonzero``, ``decode`` or ``prefill``.
        label: for a plot.
        values: of every result of the group, None where it is not known.
    """

    key: str
    label: str
    values: list[float | None]


@dataclass(frozen=True)
class Ranked:
    """Results that can be compared, the least divergence first.

    Attributes:
        judged: on what, in words; what makes the group.
        results: in order.
        axes: what they are weighed by.
        best: per axis, whether a result is on the frontier.
    """

    judged: str
    results: list[Result]
    axes: list[Axis]
    best: dict[str, list[bool]]


def frontier(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether each point is beaten by none: no other is as good on every axis and better on one. Less is better."""
    return [
        not any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        for point in points
    ]


def ranked(results: Sequence[Result]) -> list[Ranked]:
    """Groups of results that can be compared, each ranked by itself, in the order in which they are met."""
    groups: list[list[Result]] = []
    for result in results:
        for group in groups:
            if comparable(group[0].report, result.report):
                group.append(result)
                break
        else:
            groups.append([result])
    return [_rank(group) for group in groups]


def comparable(a: Report, b: Report) -> bool:
    """Whether both are judged on the same tokens, against the same dense model."""
    return not differences(a, b)


def differences(a: Report, b: Report) -> list[str]:
    """Why two reports cannot be compared, in plain words; nothing if they can."""
    found = []
    before = [r.size_bytes["before"] for r in (a, b)]
    dense = [r.perplexity["before"] for r in (a, b)]
    if bool(a.evaluation) != bool(b.evaluation):
        found.append("one of them was not judged")
    elif _rows(a) != _rows(b):
        found.append("judged on other tokens")
    if before[0] != before[1]:
        found.append(f"another dense model: {bytes_text(before[0])} and {bytes_text(before[1])}")
    elif found or not a.evaluation:
        found += ["another dense model, by its name"] if a.model != b.model and not found else []
    elif dense[0] is None or dense[1] is None or not math.isclose(dense[0], dense[1], rel_tol=SAME):
        found.append(f"another dense model: its perplexity is {figure(dense[0], '.3f')} and {figure(dense[1], '.3f')}")
    return found


def nonzero_weights(report: Report) -> float:
    """Weights of the compressed matrices that are not zero: multiplications per token."""
    return float(sum(m.weights - m.zeros for m in report.matrices))


def judged_on(report: Report) -> str:
    """In words: the dense model and the text."""
    perplexity, rows = report.perplexity["before"], report.evaluation
    if not rows:
        return f"{report.model}, not judged"
    known = "" if perplexity is None else f", dense perplexity {perplexity:.3f}"
    return f"{report.model} on {rows_text(rows)}{known}"


def _rows(report: Report) -> tuple[object, ...]:
    rows = report.evaluation
    if not rows:
        return ()
    if "sha256" in rows:
        return (rows["sha256"],)
    return tuple(rows.get(key) for key in ("source", "samples", "length", "seed"))


def _rank(group: list[Result]) -> Ranked:
    def divergence(result: Result) -> float:
        return math.inf if result.report.kl_divergence is None else result.report.kl_divergence

    group = sorted(group, key=divergence)
    reports = [r.report for r in group]
    axes = [
        Axis("size", "weights on disk, MiB", [_mebibytes(r.size_bytes["after"]) for r in reports]),
        Axis("nonzero", "non-zero weights, millions", [nonzero_weights(r) / 1e6 or None for r in reports]),
    ]
    machines = {r.machine for r in group if r.speeds}
    for kind in SPEEDS if len(machines) == 1 else ():
        times = [1e3 / r.speeds[kind].after if kind in r.speeds else None for r in group]
        if sum(time is not None for time in times) > 1:  # one alone is on no frontier
            axes.append(Axis(kind, f"ms per token, {kind}", times))
    best = {axis.key: _on_frontier(axis, [divergence(r) for r in group]) for axis in axes}
    return Ranked(judged_on(reports[0]), group, axes, best)


def _on_frontier(axis: Axis, divergences: list[float]) -> list[bool]:
    places = [i for i, v in enumerate(axis.values) if v is not None and math.isfinite(divergences[i])]
    found = frontier([(axis.values[i] or 0.0, divergences[i]) for i in places])
    on = dict(zip(places, found, strict=True))
    return [on.get(i, False) for i in range(len(axis.values))]


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
