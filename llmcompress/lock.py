"""A lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.errors import UserError

try:
    import fcntl
except ImportError:  # not POSIX: no lock
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Held from the start; a file named ``lock`` in a folder that is made if needed.

    Args:
        folder: which must not be written by two processes at once.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # whoever held it has just removed the folder
                continue
            self._take(folder)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)  # that file was removed before we had it
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """The file stays."""
        os.close(self._descriptor)

    def _take(self, folder: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 20).decode().strip()
            os.close(self._descriptor)
            raise UserError(
                f"process {holder} is writing it" if holder else "another process is writing it",
                str(folder), "wait for it, or choose another --output",
            ) from None  # fmt: skip
