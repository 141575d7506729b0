"""Where a result may be written: checked before any work, so that nobody waits for a run that cannot be saved."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from llmcompress.errors import UserError
from llmcompress.table import bytes_text

RECORD = "llmcompress.json"
"""The file that marks a folder as this program's own output: only such a folder is ever replaced."""

DESCRIPTION = "network.json"
"""The file that says how a convolutional network is built; no folder of a language model has one."""

PACKED = "sparse.json"
"""The file that lists what a packed folder holds; no checkpoint has one."""


def holds_network(folder: Path) -> bool:
    """Whether a folder is of the command ``vision``."""
    return (folder / DESCRIPTION).is_file()


def refuse_network(folder: Path) -> None:
    """Says plainly what a convolutional network is not for.

    Raises:
        UserError: the folder holds one.
    """
    if holds_network(folder) or _classifies_images(folder / "config.json"):
        raise UserError(
            "holds a convolutional network, and this is for language models", str(folder),
            "use the command vision, or llmcompress.vision.load_vision",
        )  # fmt: skip


def is_packed(folder: Path) -> bool:
    """Whether ``pack`` wrote the folder, which nothing runs from."""
    return (folder / PACKED).is_file()


def refuse_packed(folder: Path) -> None:
    """Says how a packed folder is used.

    Raises:
        UserError: it is one.
    """
    if is_packed(folder):
        raise UserError("is packed", str(folder), f"unpack it first: python -m llmcompress unpack {folder} OUT")


def _classifies_images(config: Path) -> bool:
    """Whether a configuration of transformers says so."""
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        return any(str(name).endswith("ForImageClassification") for name in named)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # who reads the folder says what is wrong with it


def check_output(output: Path, force: bool = False, source: Path | None = None) -> None:
    """Refuses an output folder that could not, or should not, be written; call it before any work.

    Raises:
        UserError: it exists (without ``force``), is not this program's own output (with ``force``), is the input
            model or holds it, or its parent cannot be written.
    """
    output = Path(output)
    where = str(output)
    if source is not None and Path(source).exists():
        model = Path(source).resolve()
        if output.resolve() == model or output.resolve() in model.parents:
            raise UserError("would overwrite the input model", where, "choose another output folder")
    if output.is_symlink() or output.exists():
        _check_replaceable(output, force)
    parent = _nearest_existing(output.absolute().parent)
    if not parent.is_dir():
        raise UserError(f"{parent} is not a folder", where, "choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write into {parent}", where, "choose another output folder")


def check_disk_space(path: Path, needed_bytes: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        UserError: the file system that will hold ``path`` has fewer than ``needed_bytes`` free.
    """
    free = shutil.disk_usage(_nearest_existing(Path(path).absolute())).free
    if free < needed_bytes:
        raise UserError(
            f"needs about {bytes_text(needed_bytes)} but only {bytes_text(free)} of disk space are free",
            str(path),
            "free some space or choose another output folder",
        )


def is_full_disk(error: BaseException | None) -> bool:
    """Whether that is what an error tells; the safetensors library tells the system's errors in words only."""
    if isinstance(error, SafetensorError):
        return f"os error {errno.ENOSPC}" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _check_replaceable(output: Path, force: bool) -> None:
    if not force:
        raise UserError("already exists", str(output), "choose another output folder, or replace it with --force")
    ours = not output.is_symlink() and output.is_dir()
    if not ours or (any(output.iterdir()) and not (output / RECORD).is_file()):
        raise UserError(
            f"is not an output of this program (no {RECORD} in it), so --force does not replace it",
            str(output),
            "remove it yourself or choose another output folder",
        )


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes folders ``prefix + process number`` whose process runs no longer: it was killed while it wrote."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        if not _runs(folder.name.removeprefix(prefix)):
            shutil.rmtree(folder, ignore_errors=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of the folders that are empty, in this order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def put_in_place(written: Path, output: Path, old: Path) -> None:
    """Renames what is there to ``old``, the ``written`` folder to ``output``, and only then deletes the old one."""
    replacing = output.exists()
    if replacing:
        output.rename(old)
    try:
        written.rename(output)
    except BaseException:
        if replacing:
            old.rename(output)
        raise
    sync(output.parent)
    if replacing:
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, wanted: Callable[[], bool] = lambda: True) -> str:
    """Of a file, in hexadecimal digits; of its beginning if it is ``wanted`` no longer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while wanted() and (chunk := file.read(1 << 22)):
            digest.update(chunk)
    return digest.hexdigest()


def _runs(pid: str) -> bool:
    """Whether a process of this number runs; yes where that cannot be told."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
