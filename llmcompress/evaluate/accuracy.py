"""What lm-eval's tasks say about a model, with intervals, and beside a reference item by item.

The value of a metric is lm-eval's own. Its interval is Wilson's for shares of items, elsewhere a bootstrap. Where every
item is right or wrong, two models are compared by McNemar's exact test on the items that one has right and the other
wrong; other metrics by a paired permutation test over items. p values of one table are adjusted by Holm's method before
a difference is called one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.evaluate import statistics
from llmcompress.evaluate.quality import Estimate, exp

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TaskBeside:
    """A metric of the model beside the reference's on the same items.

    Attributes:
        reference: its value.
        difference: of the model from it.
        p: of the test; None where items cannot be paired (one item, or a metric that is no mean over items).
        p_adjusted: by Holm, over the rows of the same level.
        test: ``mcnemar``, ``permutation`` or empty.
        gained, lost: items that only the model, only the reference has right; None but for ``mcnemar``.
        verdict: ``worse``, ``better`` or ``within noise``, by ``p_adjusted``.
    """

    reference: float
    difference: float
    p: float | None
    p_adjusted: float | None
    test: str
    gained: int | None
    lost: int | None
    verdict: str


@dataclass(frozen=True)
class TaskQuality:
    """One metric of one task, of a group of tasks, or of the items of a task that share a field.

    Attributes:
        task: name; of a part, the field's value.
        metric: e.g. ``acc``; with lm-eval's filter, if that is not ``none``, as ``exact_match,strict-match``.
        items: evaluated.
        level: ``task``, ``group``, ``member`` (a task inside a group) or ``part``.
        of: the task that a part, or the group that a member belongs to.
        value: with its interval.
        higher_is_better: of the metric.
        shots: examples in the prompt; None for groups.
        version: of the task's definition, as lm-eval reports it.
        beside: None without a reference.
    """

    task: str
    metric: str
    items: int
    level: str
    of: str
    value: Estimate
    higher_is_better: bool
    shots: int | None
    version: str
    beside: TaskBeside | None


def task_qualities(found: dict[str, Any], reference: dict[str, Any] | None, seed: int) -> list[TaskQuality]:
    """Every metric of every task, group and part.

    Args:
        found: lm-eval's results of the model, with samples.
        reference: the same of the reference, on the same tasks.
        seed: of the bootstrap and the permutations.
    """
    generator = np.random.default_rng(seed)
    rows = [_row(metric, generator) for metric in _metrics(found, reference)]
    for levels in (("task", "group"), ("member",), ("part",)):
        rows = _adjusted(rows, levels)
    return rows


@dataclass(frozen=True)
class _Metric:
    """A metric's values by item, in strata (the tasks of a group), of both models; None where it is no mean."""

    row: TaskQuality
    model: list[Floats] | None
    reference: list[Floats] | None
    reference_value: float | None


def _metrics(found: dict[str, Any], reference: dict[str, Any] | None) -> Iterator[_Metric]:
    groups = {name: _leaves(name, found["group_subtasks"]) for name in found.get("groups") or {}}
    inside = {task: group for group, tasks in reversed(groups.items()) for task in tasks}
    for name in [*groups, *found["samples"]]:
        tasks = groups.get(name, [name])
        level = "group" if name in groups and name not in inside else "member" if name in inside else "task"
        for key, value in found["results"][name].items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            shots = None if name in groups else found["n-shot"].get(name)
            row = TaskQuality(
                name, metric if chosen == "none" else key, sum(found["n-samples"][t]["effective"] for t in tasks),
                level, inside.get(name, ""), Estimate(float(value)), _higher_is_better(found, tasks, metric),
                shots, str(found["versions"].get(name, "")), None,
            )  # fmt: skip
            both = [
                None if results is None else [_items(results["samples"][task], metric, chosen) for task in tasks]
                for results in (found, reference)
            ]
            other = None if reference is None else float(reference["results"][name][key])
            strata = [_complete(parts) for parts in both]
            yield _Metric(row, strata[0], strata[1], other)
            if name not in groups:
                yield from _parts_of(row, found["configs"][name], found["samples"][name], chosen, strata)


def _parts_of(
    row: TaskQuality, config: dict[str, Any], samples: list[dict[str, Any]], chosen: str, strata: list[Any]
) -> Iterator[_Metric]:
    """The metric by the values of the field that the task's metadata names as ``group_by``."""
    field = (config.get("metadata") or {}).get("group_by")
    if field is None or strata[0] is None or strata[0][0].ndim > 1:
        return
    names = np.array([str(s["doc"].get(field, "")) for s in samples if s["filter"] == chosen])
    if len(set(names)) < 2:
        return
    for name in sorted(set(names)):
        model, reference = (None if values is None else [values[0][names == name]] for values in strata)
        assert model is not None
        part = replace(row, task=name, items=len(model[0]), level="part", of=row.task, value=_value(model))
        yield _Metric(part, model, reference, None if reference is None else _value(reference).value)


def _row(metric: _Metric, generator: np.random.Generator) -> TaskQuality:
    row, model, reference = metric.row, metric.model, metric.reference
    low, high = _interval(row, model, generator)
    row = replace(row, value=Estimate(row.value.value, low, high))
    if metric.reference_value is None:
        return row
    p, test, gained, lost = _tested(row, model, reference, generator)
    difference = row.value.value - metric.reference_value
    beside = TaskBeside(metric.reference_value, difference, p, p, test, gained, lost, "")
    return replace(row, beside=beside)


def _tested(
    row: TaskQuality, model: list[Floats] | None, reference: list[Floats] | None, generator: np.random.Generator
) -> tuple[float | None, str, int | None, int | None]:
    """p, the test's name, and the items that only one of both has right."""
    if model is None or reference is None or [m.shape for m in model] != [r.shape for r in reference] or row.items < 2:
        return None, "", None, None
    if model[0].ndim == 2:
        differences = np.concatenate([m[:, 0] - r[:, 0] for m, r in zip(model, reference, strict=True)])
        return statistics.paired_permutation(differences, generator), "permutation", None, None
    weights = _weights(row, model) or [1.0] * len(model)
    if len(set(weights)) == 1 and all(np.isin(values, (0, 1)).all() for values in (*model, *reference)):
        ours, theirs = np.concatenate(model), np.concatenate(reference)
        gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
        return statistics.mcnemar(gained, lost), "mcnemar", gained, lost
    differences = np.concatenate([w * (m - r) for w, m, r in zip(weights, model, reference, strict=True)])
    return statistics.paired_permutation(differences, generator), "permutation", None, None


def _adjusted(rows: list[TaskQuality], levels: tuple[str, ...]) -> list[TaskQuality]:
    """The rows with Holm's p and the verdict filled in for those of the levels."""
    chosen = [
        i for i, row in enumerate(rows) if row.level in levels and row.beside is not None and row.beside.p is not None
    ]
    tested = [rows[i].beside for i in chosen]
    adjusted = statistics.holm([b.p for b in tested if b is not None and b.p is not None])
    rows = list(rows)
    for i, p in zip(chosen, adjusted, strict=True):
        beside = rows[i].beside
        assert beside is not None
        worse = (beside.difference < 0) == rows[i].higher_is_better
        rows[i] = replace(rows[i], beside=replace(beside, p_adjusted=p, verdict=statistics.verdict(p, worse)))
    return rows


def _items(samples: list[dict[str, Any]], metric: str, chosen: str) -> Floats | None:
    """(items,) values, or (items, 2) log-likelihoods and the counts they are divided by; None for other kinds."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
    if values and all(isinstance(v, Real) for v in values):
        return np.array(values, dtype=np.float64)
    if values and all(
        isinstance(v, tuple | list) and len(v) == 2 and all(isinstance(x, Real) for x in v) for v in values
    ):
        return np.array(values, dtype=np.float64)
    return None


def _complete(parts: list[Floats | None] | None) -> list[Floats] | None:
    if parts is None:
        return None
    whole = [part for part in parts if part is not None]
    return whole if len(whole) == len(parts) and len({part.ndim for part in whole}) == 1 else None


def _value(strata: list[Floats]) -> Estimate:
    return Estimate(float(np.concatenate(strata).mean()))


def _interval(
    row: TaskQuality, strata: list[Floats] | None, generator: np.random.Generator
) -> tuple[float | None, float | None]:
    """Of a mean of items, of a mean of tasks' means, or of a perplexity; none if the value is something else."""
    none = (None, None)
    if strata is None or row.items < 2:
        return none
    if strata[0].ndim == 2:
        return _perplexity_interval(row, strata, generator) or none
    weights = _weights(row, strata)
    if weights is None:
        return none
    if len(set(weights)) == 1 and all(np.isin(values, (0, 1)).all() for values in strata):
        return statistics.share_interval(sum(int(values.sum()) for values in strata), row.items)
    draws: Floats = np.zeros(statistics.RESAMPLES)
    for values, weight in zip(strata, weights, strict=True):
        if np.isin(values, (0, 1)).all():  # a resample of 0s and 1s is a binomial draw
            draws += weight * generator.binomial(len(values), values.mean(), statistics.RESAMPLES)
        else:
            draws += weight * statistics.resampled_sums(values[:, None], generator)[:, 0]
    return statistics.interval(draws) or none


def _perplexity_interval(
    row: TaskQuality, strata: list[Floats], generator: np.random.Generator
) -> tuple[float, float] | None:
    if len(strata) > 1 or row.metric not in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        return None
    draws = statistics.resampled_sums(strata[0], generator)
    limits = statistics.interval(-draws[:, 0] / draws[:, 1])
    if limits is None:
        return None
    if row.metric == "bits_per_byte":
        return limits[0] / math.log(2), limits[1] / math.log(2)
    return exp(limits[0]), exp(limits[1])


def _weights(row: TaskQuality, strata: list[Floats]) -> list[float] | None:
    """What an item of each stratum counts in the value: as much as every item, or its share in its own task's mean."""
    every = 1 / sum(len(values) for values in strata)
    for weights in ([every] * len(strata), [1 / len(strata) / len(values) for values in strata]):
        if math.isclose(
            sum(w * float(v.sum()) for w, v in zip(weights, strata, strict=True)), row.value.value, abs_tol=1e-9
        ):
            return weights
    return None


def _higher_is_better(found: dict[str, Any], tasks: list[str], metric: str) -> bool:
    return all(bool((found["higher_is_better"].get(task) or {}).get(metric, True)) for task in tasks)


def _leaves(group: str, subtasks: dict[str, list[str]]) -> list[str]:
    """Names of the tasks in a group and in the groups inside it."""
    return [leaf for name in subtasks[group] for leaf in (_leaves(name, subtasks) if name in subtasks else [name])]
