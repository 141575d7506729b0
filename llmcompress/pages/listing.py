"""What the page of any run lists: its phases and its matrices."""

from __future__ import annotations

from collections.abc import Mapping

from llmcompress.report import MatrixReport

#: matrices listed one by one; of more, those of the largest errors
LISTED = 700


def phase_rows(seconds_by_phase: Mapping[str, float], seconds: float) -> list[tuple[str, float, float]]:
    """(name, seconds, share of the whole run in per cent), the longest first; what no phase counts is the last."""
    found = sorted(seconds_by_phase.items(), key=lambda item: -item[1])
    other = seconds - sum(part for _, part in found)
    if other > 0.005 * seconds:
        found.append(("other", other))
    return [(name, part, 100 * part / max(seconds, 1e-9)) for name, part in found]


def listed(matrices: list[MatrixReport], most: int = LISTED) -> list[MatrixReport]:
    """In order, as many as a page can bear."""
    if len(matrices) <= most:
        return matrices
    ranks = sorted(range(len(matrices)), key=lambda i: -(matrices[i].relative_error or 0.0))[:most]
    return [matrices[i] for i in sorted(ranks)]
