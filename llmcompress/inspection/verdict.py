"""What an inspection found: what holds, what could not be checked, and what is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmcompress.errors import one_line


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the folder says.

    Attributes:
        check: which law it breaks, e.g. ``hashes`` or ``grid``.
        where: file, tensor or key.
        what: said and found.
    """

    check: str
    where: str
    what: str


@dataclass
class Verdict:
    """The findings of all checks.

    Attributes:
        held: by check, how many things were seen to be as they should.
        unchecked: what could not be verified, and why.
        wrong: what is not as the folder says.
    """

    held: Counter[str] = field(default_factory=Counter)
    unchecked: list[str] = field(default_factory=list)
    wrong: list[Finding] = field(default_factory=list)

    def require(self, holds: bool, check: str, where: str, what: str) -> bool:
        """Notes that a thing holds, or what is wrong with it; returns ``holds``."""
        if holds:
            self.held[check] += 1
        else:
            self.fail(check, where, what)
        return holds

    def fail(self, check: str, where: str, what: str) -> None:
        """Notes what is wrong, once."""
        finding = Finding(check, one_line(where), one_line(what))
        if finding not in self.wrong:
            self.wrong.append(finding)

    def skip(self, what: str) -> None:
        """Notes what could not be checked, once."""
        if one_line(what) not in self.unchecked:
            self.unchecked.append(one_line(what))
