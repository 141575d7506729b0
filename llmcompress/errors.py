"""The exception a user's mistake raises: what is wrong, where, and how to mend it. A machine's fault is one too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 1500


class UserError(Exception):
    """Bad input. The command line prints it as one line and exits with code 2.

    Args:
        what: what is wrong, e.g. ``group size 128 does not divide 704 input columns``.
        where: the file, tensor, option or recipe key concerned.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(one_line(f"{line}; {fix}" if fix else line))


def one_line(text: str) -> str:
    """Names in files may hold anything: line breaks, a terminal's commands, megabytes. None of it gets to the user."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


class Fault(UserError):
    """The machine failed, not the input: a full disk, a file that cannot be read any more. What is done so far is good,
    and the same run can go on once the fault is mended."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The fix for a misspelt name: the nearest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"
