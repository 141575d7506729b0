"""The whole network as tables of blocks × kinds of matrices, every cell in the colour of its figure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from llmcompress.pages.drawing import cell_colors
from llmcompress.report import BlockReport, MatrixReport, Report

#: kinds of matrices that a map has columns for
COLUMNS = 24
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """One figure: ``text`` as shown, ``title`` in full, and its colours; empty where there is no such matrix."""

    text: str = ""
    title: str = ""
    background: str = ""
    color: str = ""


@dataclass(frozen=True)
class Map:
    """``rows`` are pairs of a block's name and its cells, one per column, in ``unit``; ``low`` and ``high`` end the
    scale."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    low: str
    high: str
    unit: str


def kind_of(name: str, block: str) -> str:
    """``mlp.experts.*.up_proj`` of ``model.layers.3.mlp.experts.7.up_proj``."""
    return re.sub(r"\b\d+\b", "*", name.removeprefix(block + "."))


def short_block(name: str) -> str:
    """The number that ends a block's name, or the name."""
    found = re.search(r"\d+$", name)
    return found[0] if found else name


def per_cent(value: float) -> str:
    """Two digits, as short as they can be: ``2.3``, ``0.047``, ``3e-05``; ``<1e-9`` below that."""
    value *= 100
    if value and value < 1e-9:
        return "<1e-9"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def error_map(report: Report) -> Map | None:
    """Relative errors in per cent, on a logarithmic scale; of several matrices in a cell, the worst."""

    def worst(matrices: list[MatrixReport]) -> float | None:
        known = [m.relative_error for m in matrices if m.relative_error is not None]
        return max(known) if known else None

    errors = [m.relative_error for m in report.matrices if m.relative_error and math.isfinite(m.relative_error)]
    most = 100 * max(errors, default=1.0)
    power = 3 * math.ceil(-math.log10(most) / 3) if most < 0.1 else 0
    unit = f"10{str(-power).translate(_RAISED)} %" if power else "%"
    return _map(report, worst, lambda e: per_cent(e * 10**power), lambda e: f"relative error {e:.3e}", unit,
                logarithmic=True)  # fmt: skip


def zeros_map(report: Report) -> Map | None:
    """Shares of zeros in per cent, from none to all."""
    return _map(report, lambda ms: _mean(ms, "sparsity"), lambda s: f"{100 * s:.0f}", lambda s: f"{s:.2%} zeros",
                "%", scale=(0.0, 1.0))  # fmt: skip


def bits_map(report: Report) -> Map | None:
    """Stored bits per weight, from none to the most."""
    most = max((m.bits for m in report.matrices), default=1.0)
    return _map(report, lambda ms: _mean(ms, "bits"), lambda b: f"{b:.3g}", lambda b: f"{b:.3f} bits a weight",
                "bits a weight", scale=(0.0, max(16.0, most)))  # fmt: skip


def _map(
    report: Report,
    figure: Callable[[list[MatrixReport]], float | None],
    text: Callable[[float], str],
    title: Callable[[float], str],
    unit: str,
    scale: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Map | None:
    found = [{kind: figure(ms) for kind, ms in by_kind(block).items()} for block in report.blocks]
    columns = list(dict.fromkeys(kind for row in found for kind in row))[:COLUMNS]
    known = [value for row in found for value in row.values() if value is not None and math.isfinite(value)]
    if not known:
        return None
    low, high = scale or (min(known), max(known))
    rows = []
    for block, values in zip(report.blocks, found, strict=True):
        cells = []
        for kind in columns:
            value = values.get(kind)
            if value is None or not math.isfinite(value):
                cells.append(Cell())
                continue
            place = _place(value, low, high, logarithmic)
            where = f"{block.name}.{kind}: {title(value)}"
            cells.append(Cell(text(value), where, *cell_colors(place)))
        rows.append((block.name, cells))
    return Map(columns, rows, text(low), text(high), unit)


def by_kind(block: BlockReport) -> dict[str, list[MatrixReport]]:
    """The block's matrices by kind, in the order in which they are met."""
    found: dict[str, list[MatrixReport]] = {}
    for matrix in block.matrices:
        found.setdefault(kind_of(matrix.name, block.name), []).append(matrix)
    return found


def _place(value: float, low: float, high: float, logarithmic: bool) -> float:
    if logarithmic:
        value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
    return (value - low) / (high - low) if high > low else 0.5


def _mean(matrices: list[MatrixReport], attribute: str) -> float:
    total = sum(m.weights for m in matrices)
    return sum(getattr(m, attribute) * m.weights for m in matrices) / max(total, 1)
