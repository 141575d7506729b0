"""What a compressed folder says about itself, read back: ``report.json``, and beside it what there is of
``recipe.yaml``, the command in ``llmcompress.json``, ``bench.json`` and ``evaluation.json``.

``bench.json`` is a JSON object with speeds measured on the folder. Read are ``machine`` (a string: processor, threads,
runtime; speeds of different machines are not compared) and, under ``tokens_per_second``, ``decode`` and ``prefill``,
each a mapping of ``after`` and, where it was measured too, ``before`` (the dense model's) to a number."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmcompress.errors import UserError
from llmcompress.export.destination import RECORD, refuse_network
from llmcompress.pages.evaluations import EVALUATION, Judgement, judgements, limited
from llmcompress.report import Report

BENCH = "bench.json"
#: what a speed is of
SPEEDS = ("decode", "prefill")


@dataclass(frozen=True)
class Speed:
    """Tokens per second, ``before`` for the dense model and ``after``; None where it was not measured."""

    after: float
    before: float | None = None


@dataclass(frozen=True)
class Result:
    """One compressed folder.

    Attributes:
        name: what to call it.
        report: its figures.
        recipe: as YAML; empty if it is not there.
        command: the command line that made it; empty if it is not known.
        speeds: by what they are of, see SPEEDS.
        machine: on which they were measured.
        judged: what an evaluation found later, on other texts and tasks.
        limited: what that evaluation left out, in a sentence.
    """

    name: str
    report: Report
    recipe: str = ""
    command: str = ""
    speeds: dict[str, Speed] = field(default_factory=dict)
    machine: str = ""
    judged: list[Judgement] = field(default_factory=list)
    limited: str = ""


def read_result(folder: str | Path) -> Result:
    """Reads a compressed folder.

    Raises:
        UserError: it is not one, or a file in it is not what it should be.
    """
    folder = Path(folder)
    refuse_network(folder)
    file = folder / "report.json"
    if not file.is_file():
        what = "is not a folder" if not folder.is_dir() else "holds no report.json"
        raise UserError(what, str(folder), "give folders that `python -m llmcompress` wrote")
    try:
        report = Report.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(_one_line(error), str(file), "compress again, or restore the file") from None
    recipe, command = read_making(folder)
    speeds, machine = _read_bench(folder / BENCH)
    return Result(
        folder.resolve().name,
        report,
        recipe,
        command,
        speeds,
        machine,
        *_read_evaluation(folder / EVALUATION),
    )


def read_making(folder: Path) -> tuple[str, str]:
    """The recipe of an output, as YAML, and the command that made it; empty where they are not there."""
    recipe, record = folder / "recipe.yaml", _object(folder / RECORD)
    return recipe.read_text(encoding="utf-8") if recipe.is_file() else "", str(record.get("command", ""))


def read_results(folders: list[str]) -> list[Result]:
    """Several of them, under names that differ: the folders' own, or their paths where those are the same.

    Raises:
        UserError: one of them cannot be read, or is given twice.
    """
    places = [str(Path(folder).resolve()) for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UserError("is given twice", folder, "give every result once")
    found = [read_result(folder) for folder in folders]
    names = [result.name for result in found]
    return [
        replace(r, name=str(Path(folder))) if names.count(r.name) > 1 else r
        for folder, r in zip(folders, found, strict=True)
    ]


def _read_bench(file: Path) -> tuple[dict[str, Speed], str]:
    bench = _object(file)
    rates = bench.get("tokens_per_second", {})
    speeds = {}
    for kind in SPEEDS:
        pair = rates.get(kind) if isinstance(rates, dict) else None
        if pair is None:
            continue
        after, before = (pair.get(key) if isinstance(pair, dict) else None for key in ("after", "before"))
        if after is None or not all(_positive(rate) for rate in (after, before) if rate is not None):
            raise UserError(
                f"tokens_per_second.{kind} is not a pair of speeds", str(file), "measure again, or remove it"
            )
        speeds[kind] = Speed(after, before)
    return speeds, str(bench.get("machine", ""))


def _read_evaluation(file: Path) -> tuple[list[Judgement], str]:
    content = _object(file)
    try:
        return (judgements(content), limited(content)) if content else ([], "")
    except ValueError as error:
        raise UserError(_one_line(error), str(file), "evaluate again, or remove it") from None


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"not readable as JSON: {_one_line(error)}", str(file), "restore or remove it") from None
    if not isinstance(found, dict):
        raise UserError("is not a JSON object", str(file), "restore or remove it")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
