"""lm-eval's tasks by name, with their data, quickly.

lm-eval reads all of its 14,000 tasks' files to know their names, 15 s on two cores. Here the files' text is searched
for the names that are wanted, and only the folders that define these are read. Where the Hub does not answer, data sets
are looked for on this machine only, instead of in half a minute of retries each."""

from __future__ import annotations

import difflib
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import yaml

from llmcompress.errors import UserError
from llmcompress.evaluate.tasks import Wanted, with_data
from llmcompress.resources import eval_dir

_NAME = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w.\-]+)[\"']?[ \t]*$", re.MULTILINE)
_TAG = re.compile(r"^tag:[ \t]*(?:([\w.\-]+)[ \t]*$|((?:\n[ \t]*-[ \t]*[\w.\-]+)+))", re.MULTILINE)
#: seconds the Hub has to answer before data sets are looked for on this machine only
_PROBE_SECONDS = 3.0


def load_tasks(wanted: list[Wanted]) -> tuple[list[Any], Any]:
    """lm-eval's task and group objects, their data read, and the manager that knows them.

    Raises:
        UserError: lm-eval is not installed, a name is unknown (with the nearest), or a data set cannot be had.
    """
    manager_class = _lm_eval()
    named = [task.name for task in wanted if task.data is None and not task.is_file]
    folders = _folders(named, manager_class) if named else []
    manager = manager_class(include_path=[str(eval_dir()), *map(str, folders)], include_defaults=False)
    with _no_retries(bool(named)), _silent_datasets():
        return [item for task in wanted for item in _load(manager, task)], manager


def _lm_eval() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm-eval is not installed ({error})", "--tasks", "pip install 'llmcompress[eval]', or use --text"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager


def _folders(names: list[str], manager_class: Any) -> list[Path]:
    """The folders of lm-eval that define these tasks and groups, and what the groups are made of."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    homes, own = _homes(root), set(_homes(eval_dir()))
    folders: set[Path] = set()
    asked, seen = set(names), set[str]()
    while asked:
        unknown = sorted(name for name in asked if name not in homes and name not in own)
        if unknown:
            raise UserError("no such task", f"--tasks {unknown[0]}", _nearest_task(unknown[0], [*homes, *own]))
        folders |= {home for name in asked if name not in own for home in homes[name]}
        seen |= asked
        index = manager_class(include_path=[str(eval_dir()), *map(str, folders)], include_defaults=False).task_index
        asked = {member for name in seen if name in index for member in _members(index[name])} - seen
        asked = {name for name in asked if name in homes or name in own}  # others are defined inside their group
    return sorted(folders)


def _homes(root: Path) -> dict[str, set[Path]]:
    """Name of a task, group or tag → the folders right below ``root`` (or ``root``) whose files say it."""
    homes: dict[str, set[Path]] = {}
    for file in root.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8", errors="replace")
        below = file.relative_to(root).parts
        home = root / below[0] if len(below) > 1 else root
        names = _NAME.findall(text)
        for single, many in _TAG.findall(text):
            names += [single] if single else re.findall(r"[\w.\-]+", re.sub(r"(?m)^[ \t]*-", "", many))
        for name in names:
            homes.setdefault(name, set()).add(home)
    return homes


def _members(entry: Any) -> Iterator[str]:
    """Names that a group's list refers to; of a group inside it, its members' too."""
    tree: Any = entry.cfg or {}
    pending = list(tree.get("task") or []) if isinstance(tree.get("task"), list) else []
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), list):
            pending += item["task"]
        else:
            yield from (item[key] for key in ("task", "group") if isinstance(item.get(key), str))


def _nearest_task(name: str, known: Iterable[str]) -> str:
    """14,000 names are too many for one line: the nearest few, and those of this project."""
    close = difflib.get_close_matches(name, set(known), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}own: {', '.join(sorted(_homes(eval_dir())))}; others: lm-eval ls tasks"


def _load(manager: Any, task: Wanted) -> list[Any]:
    from datasets.exceptions import DatasetsError

    spec: Any = task.name if task.data is None else with_data(task)
    try:
        loaded = manager.load([spec])
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        yaml.YAMLError,
        DatasetsError,
    ) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        online = task.data is None and not task.is_file
        fix = (
            "connect to the network once, so that the data set is kept, or use a task with local data (eval/README.md)"
        )
        raise UserError(
            f"cannot be loaded ({first})", f"--tasks {task.name}", fix if online else "see eval/README.md"
        ) from error  # fmt: skip
    groups = loaded.get("groups") or {}
    inner = {name for names in (loaded.get("group_map") or {}).values() for name in names}
    outer = [group for name, group in groups.items() if name not in inner]
    return outer or list(loaded["tasks"].values())


@contextmanager
def _no_retries(needs_hub: bool) -> Iterator[None]:
    """While open, the libraries know that there is no network if there is none."""
    if not needs_hub or _hub_answers():
        yield
        return
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """While open, reading a data set shows no bars and logs no errors: what goes wrong is told in one line."""
    import datasets

    level = datasets.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _hub_answers() -> bool:
    """Whether its address takes a connection; behind a proxy that cannot be seen, and is taken for granted."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or "https" in getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlparse(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True
