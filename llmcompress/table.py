"""Plain text for a terminal: aligned columns, sizes, changes, and warnings that do not run to hundreds of lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WARNINGS_SHOWN = 12


def grouped_warnings(warnings: list[str]) -> list[str]:
    """Those that differ only in numbers between dots or brackets, such as a block's, become one line."""
    kinds: dict[str, list[str]] = {}
    for warning in warnings:
        kinds.setdefault(re.sub(r"(?<=[.\[])\d+(?=[.\]:])", "*", warning), []).append(warning)
    lines = [
        f"warning: {same[0]}" if len(same) == 1 else f"warning: {kind} ({len(same)} times)"
        for kind, same in kinds.items()
    ]
    more = len(lines) - _WARNINGS_SHOWN
    return lines if more <= 0 else [*lines[:_WARNINGS_SHOWN], f"… and {more} more kinds of warnings in report.json"]


def aligned(rows: list[list[str]]) -> str:
    """Columns of equal width: the first to the left, a trailing name too, figures to the right."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def figure(value: float | None, spec: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def bytes_text(count: float | None) -> str:
    """``3.42 MiB``, or a dash where it is not known."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return ""


def rows_text(rows: Mapping[str, Any]) -> str:
    """``16 × 128 tokens of its own samples`` or ``… of FILE``: what a model was calibrated or judged on, if on any."""
    if not rows.get("samples"):
        return "no tokens, so that errors are those of the weights"
    text = "its own samples" if rows.get("source") == "self" else str(rows.get("source"))
    return f"{rows.get('samples')} × {rows.get('length')} tokens of {text}"


def change(pair: dict[str, Any]) -> str:
    """From ``before`` to ``after`` in per cent; empty if one is not known."""
    before, after = pair["before"], pair["after"]
    return f"{after / before - 1:+.1%}" if before and after is not None else ""
