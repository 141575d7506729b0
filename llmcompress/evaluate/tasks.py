"""Which tasks are meant: one of the project's over a local file (``NAME=FILE``), a user's YAML file, or lm-eval's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.documents import jsonl_records
from llmcompress.errors import UserError, nearest
from llmcompress.evaluate.texts import file_hash
from llmcompress.resources import eval_dir

#: readers of local files: a task that uses one needs a file
_READERS = ("json", "text", "csv", "parquet")


@dataclass(frozen=True)
class Wanted:
    """One entry of ``--tasks``.

    Attributes:
        name: of a task or group, or the path of a YAML file.
        data: the local file that one of the project's tasks or the user's own file is to read; None for others.
    """

    name: str
    data: Path | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a task file of the user's own."""
        return self.name.endswith((".yaml", ".yml"))


def parse_tasks(entries: Iterable[str]) -> list[Wanted]:
    """``["a,b", "c=FILE"]`` → the tasks, each once, files of local ones checked.

    Raises:
        UserError: an empty name, a file that is missing or not what its task reads, or a local task without one.
    """
    wanted: dict[str, Wanted] = {}
    for entry in (part.strip() for text in entries for part in text.split(",")):
        name, equals, file = entry.partition("=")
        if not name or (equals and not file):
            raise UserError(
                "an empty name", f"--tasks {entry}", "write NAME, NAME=FILE or FILE.yaml, with commas between"
            )
        task = Wanted(name, Path(file) if equals else None)
        if task.is_file and not Path(name).is_file():
            raise UserError("no such file", name, "give a task's name or its YAML file")
        _check_data(task)
        wanted[name] = task
    return list(wanted.values())


def data_hashes(wanted: list[Wanted]) -> dict[str, str]:
    """SHA-256 of the local files and task files, by path."""
    files = [task.data for task in wanted if task.data] + [Path(task.name) for task in wanted if task.is_file]
    return {str(file): file_hash(file) for file in files}


def local_tasks() -> dict[str, dict[str, Any]]:
    """The configurations in ``eval/`` that read a file of the user's, by name."""
    found = {}
    for file in sorted(eval_dir().glob("*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "data" in (config.get("metadata") or {}):
            found[config["task"]] = config
    return found


def with_data(task: Wanted) -> dict[str, Any]:
    """The configuration of a task that reads a local file, with that file in it.

    Raises:
        UserError: it is the user's own, and no plain YAML.
    """
    config = _own_config(Path(task.name)) if task.is_file else local_tasks()[task.name]
    files = {"data_files": {config.get("test_split") or "test": str(Path(task.data or "").resolve())}}
    return config | {"dataset_kwargs": (config.get("dataset_kwargs") or {}) | files}


def _check_data(task: Wanted) -> None:
    """Refuses a file that is missing, or whose lines lack what the task reads."""
    local = local_tasks()
    if task.is_file:
        config = _own_config(Path(task.name))
    elif task.data is not None and task.name not in local:
        raise UserError("takes no file", f"--tasks {task.name}={task.data}", nearest(task.name, local))
    else:
        config = local.get(task.name, {})
    what = (config.get("metadata") or {}).get("data", "a file of data")
    if task.data is None:
        kwargs = config.get("dataset_kwargs") or {}
        if config.get("dataset_path") in _READERS and not kwargs.keys() & {"data_files", "data_dir"}:
            raise UserError(f"reads {what} of yours", f"--tasks {task.name}", f"write {task.name}=FILE")
        return
    if not task.data.is_file():
        raise UserError("no such file", str(task.data), f"give {what}")
    if not task.data.stat().st_size:
        raise UserError("is empty", str(task.data), f"give {what}")
    fields = (config.get("metadata") or {}).get("fields") or []
    for record in jsonl_records(task.data) if fields else ():
        missing = [field for field in fields if field not in record.fields]
        if missing:
            shown = ", ".join(record.fields) or "nothing"
            raise UserError(
                f"has no {missing[0]}, but {shown}", record.where, f"write {', '.join(fields)} on every line"
            )


def _own_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), _Lenient)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"is not YAML ({' '.join(str(error).split())[:120]})", str(file), "see eval/README.md"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str | list):
        raise UserError("is no task of lm-eval", str(file), "copy eval/choices_local.yaml and change it")
    return config


class _Lenient(yaml.SafeLoader):
    """Reads ``!function`` as its text: only lm-eval runs it."""


_Lenient.add_constructor("!function", lambda loader, node: f"!function {node.value}")
