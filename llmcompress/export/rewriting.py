"""A folder made from another one: written under a hidden name beside its own, which it gets when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmcompress.errors import UserError
from llmcompress.export.destination import check_output, is_full_disk, put_in_place, remove_abandoned
from llmcompress.measure import versions

#: of a record: the layout that the folder was converted to
CONVERTED = "converted"


def conversion_record(folder: Path, kind: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What ``llmcompress.json`` says of a folder in another program's layout.

    Args:
        folder: it was made from.
        kind: the layout.
        hashes: SHA-256 of each weight file by name.
    """
    return {"model": str(folder), CONVERTED: kind, "sha256": dict(hashes), "versions": versions()}


@contextmanager
def new_folder(output: Path, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Where to write; renamed to ``output`` when the block is left, removed if that is by an exception.

    Args:
        output: the final name.
        force: replace an earlier output of this program; with it, even the folder that is read.
        source: the folder that is read.

    Raises:
        UserError: ``output`` may not be written or replaced, or the disk is full.
    """
    output = Path(output).absolute()
    in_place = source is not None and force and output == Path(source).absolute()
    check_output(output, force, None if in_place else source)
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.partial-"
    remove_abandoned(output.parent, prefix)
    partial = output.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, output, output.parent / f".{output.name}.replaced-{os.getpid()}")
    except OSError as error:
        if is_full_disk(error):
            raise UserError("the disk is full", str(output), "free some space or choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
