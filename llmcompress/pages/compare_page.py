"""Several results side by side: a table for the terminal, plain data, and one page with the frontier of quality against
size, non-zero weights and speed. Results that cannot be compared are in groups of their own, never ranked together."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from llmcompress.pages.drawing import INK, SERIES, canvas, inline
from llmcompress.pages.frontier import Axis, Ranked, differences
from llmcompress.pages.plots import Picture
from llmcompress.pages.results import SPEEDS, Result
from llmcompress.pages.template import filled
from llmcompress.report import Report
from llmcompress.table import aligned, bytes_text, change, figure

#: divergences that spread over more than this factor are drawn on a logarithmic scale
WIDE = 20.0
#: share of the range within which two points share a label
NEAR = 0.015
#: points that a character of a label takes, and the height of a label
DIGIT, HIGH = 7.0, 11.0
_NOT_COMPARABLE = "These results fall into {} groups that cannot be compared; each is ranked by itself."


def text(groups: list[Ranked]) -> str:
    """For a terminal: one table a group, best first, with what each result is best for."""
    parts = [_NOT_COMPARABLE.format(len(groups))] if len(groups) > 1 else []
    for number, group in enumerate(groups):
        apart = [f"apart from the first group: {'; '.join(_apart(groups, number))}"] if number else []
        parts.append("\n".join([group.judged, *apart, aligned(table(group))]))
        parts += [aligned([[*row, ""] for row in further])] if (further := judged_table(group)) else []
    return "\n\n".join(parts)


def table(group: Ranked) -> list[list[str]]:
    """Head and one row a result. ``frontier`` names the axes on which no other result is as good and loses less."""
    timed = [kind for kind in SPEEDS if any(kind in r.speeds for r in group.results)]
    heads = ["#", "result", "KL", "s.e.", "perplexity", "top-1", "size", "", "bits", "zeros"]
    rows = [[*heads, *(f"{kind} tok/s" for kind in timed), "frontier"]]
    for number, result in enumerate(group.results):
        r, speeds = result.report, [result.speeds.get(kind) for kind in timed]
        spread = "" if r.kl_stderr is None else f"{r.kl_stderr:.5f}"
        rows.append([
            str(number + 1), _called(result), figure(r.kl_divergence, ".5f"), spread,
            figure(r.perplexity["after"], ".3f"), figure(r.top1_agreement, ".1%"),
            bytes_text(r.size_bytes["after"]), change(r.size_bytes),
            figure(r.effective_bits, ".2f"), figure(r.sparsity, ".1%"),
            *("-" if s is None else f"{s.after:.1f}" for s in speeds), ", ".join(frontiers(group, number)) or "-",
        ])  # fmt: skip
    return rows


def _called(result: Result) -> str:
    """Its name, and the recipe where that does not say it."""
    recipe = result.report.recipe
    return result.name if recipe in result.name else f"{result.name} ({recipe})"


def judged_table(group: Ranked) -> list[list[str]]:
    """Head and one row a figure that evaluations of at least two results found alike; nothing if there is none."""
    figures = {item.same: item for result in group.results for item in result.judged}
    rows = []
    for same, item in figures.items():
        values = [next((j.value for j in r.judged if j.same == same), None) for r in group.results]
        if sum(value is not None for value in values) > 1:
            rows.append([item.what, *("-" if value is None else item.text(value) for value in values)])
    return [["evaluated", *(f"#{number + 1}" for number in range(len(group.results)))], *rows] if rows else []


def frontiers(group: Ranked, number: int) -> list[str]:
    """Keys of the axes on whose frontier a result of the group is."""
    return [axis.key for axis in group.axes if group.best[axis.key][number]]


def as_dict(groups: list[Ranked]) -> dict[str, Any]:
    """For JSON."""
    return {
        "comparable": len(groups) == 1,
        "groups": [
            {
                "judged": group.judged,
                "apart": _apart(groups, n),
                "results": [_plain(group, i, r) for i, r in enumerate(group.results)],
            }
            for n, group in enumerate(groups)
        ],
    }


def compare_page(groups: list[Ranked]) -> str:
    """The whole file. The same results give the same text."""
    return filled(
        "compare.html",
        title="Compressed models compared",
        groups=[
            {
                "judged": group.judged,
                "apart": _apart(groups, number),
                "table": table(group),
                "further": judged_table(group),
                "pictures": _pictures(group, number),
                "missing": [r.name for r in group.results if not r.speeds],
                "machine": next((r.machine for r in group.results if r.speeds), ""),
            }
            for number, group in enumerate(groups)
        ],
        warning=_NOT_COMPARABLE.format(len(groups)) if len(groups) > 1 else "",
    )


def _apart(groups: list[Ranked], number: int) -> list[str]:
    """Why a group is not the first one."""
    return differences(groups[0].results[0].report, groups[number].results[0].report) if number else []


def _plain(group: Ranked, number: int, result: Result) -> dict[str, Any]:
    r: Report = result.report
    return {
        "name": result.name,
        "model": r.model,
        "recipe": r.recipe,
        "size_bytes": r.size_bytes,
        "effective_bits": r.effective_bits,
        "sparsity": r.sparsity,
        "perplexity": r.perplexity,
        "kl_divergence": r.kl_divergence,
        "kl_stderr": r.kl_stderr,
        "top1_agreement": r.top1_agreement,
        "evaluation": {item.what: item.value for item in result.judged},
        "tokens_per_second": {kind: speed.after for kind, speed in result.speeds.items()},
        "frontier": frontiers(group, number),
    }


def _pictures(group: Ranked, number: int) -> list[Picture]:
    pictures = []
    for axis in group.axes:
        known = [
            i for i, x in enumerate(axis.values) if x is not None and group.results[i].report.kl_divergence is not None
        ]
        if len(known) < 2:
            continue
        best = [str(i + 1) for i in known if group.best[axis.key][i]]
        said = f"On the frontier: {', '.join(best)}. Numbers are those of the table."
        heading = f"KL against {axis.label}"
        pictures.append(
            Picture(heading, _scatter(group, axis, known, f"frontier{number}{axis.key}", heading, said), said)
        )
    return pictures


def _scatter(group: Ranked, axis: Axis, known: list[int], key: str, heading: str, said: str) -> Markup:
    """Filled marks and a line for the frontier, hollow ones for what is beaten; numbers as in the table."""
    points = {i: (float(axis.values[i] or 0.0), float(group.results[i].report.kl_divergence or 0.0)) for i in known}
    best = sorted(points[i] for i in known if group.best[axis.key][i])
    with canvas(270) as drawing:
        panel = drawing.subplots()
        panel.step(*zip(*best, strict=True), where="post", color=SERIES[1], linewidth=1.2)
        for i, (x, y) in points.items():
            on = group.best[axis.key][i]
            color = SERIES[1] if on else SERIES[0]
            panel.plot([x], [y], "o", markersize=7, markeredgecolor=color, markerfacecolor=color if on else "none")
        _scale(panel, [y for _, y in points.values()])
        _dense(panel, group, axis)
        panel.margins(0.1)
        drawing.draw_without_rendering()  # only then the layout is settled
        _label(panel, points)
        panel.set_xlabel(axis.label)
        panel.set_ylabel("KL, nats per token")
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.grid()
        return inline(drawing, key, heading, said)


def _label(panel: Axes, points: dict[int, tuple[float, float]]) -> None:
    """Every point's number, or those of several that lie on one another, where it covers no other point or number."""
    groups = _neighbours(points, panel.get_yscale() == "log")
    labels = [(points[together[0]], ", ".join(str(i + 1) for i in together)) for together in groups]
    scale = 72 / panel.figure.dpi
    marks = [panel.transData.transform(point) * scale for point in points.values()]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    taken.append((-math.inf, -math.inf, panel.bbox.x0 * scale, math.inf))  # where the scale is
    for point, label in labels:
        (x, y), wide = panel.transData.transform(point) * scale, DIGIT * len(label)
        boxes = {
            (dx, dy): (x + dx - (wide if dx < 0 else 0), y + dy, x + dx + (wide if dx > 0 else 0), y + dy + HIGH)
            for dx, dy in ((6, 5), (6, -5 - HIGH), (-6, 5), (-6, -5 - HIGH), (7, -HIGH / 2), (-7, -HIGH / 2))
        }
        free = [place for place, box in boxes.items() if not any(_overlap(box, other) for other in taken)]
        place = free[0] if free else (6, 5)
        taken.append(boxes[place])
        panel.annotate(
            label, point, place, textcoords="offset points", color=INK, ha="left" if place[0] > 0 else "right"
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, bottom, right, top) share anything."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _neighbours(points: dict[int, tuple[float, float]], logarithmic: bool) -> list[list[int]]:
    """Points so close that their labels would cover each other, together: those within NEAR of both ranges."""
    places = {i: (x, math.log(y) if logarithmic else y) for i, (x, y) in points.items()}
    spans = [max(p[k] for p in places.values()) - min(p[k] for p in places.values()) or 1.0 for k in (0, 1)]
    found: list[list[int]] = []
    for i, place in places.items():
        near = (group for group in found if all(abs(place[k] - places[group[0]][k]) <= NEAR * spans[k] for k in (0, 1)))
        group = next(near, None)
        if group is None:
            found.append([i])
        else:
            group.append(i)
    return found


def _scale(panel: Axes, divergences: list[float]) -> None:
    low, high = min(divergences), max(divergences)
    if low > 0 and high / low > WIDE:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(bottom=min(0.0, low), top=high * 1.15 or 1.0)


def _dense(panel: Axes, group: Ranked, axis: Axis) -> None:
    """Where the dense model stands, which loses nothing."""
    reports, place = [r.report for r in group.results], None
    if axis.key == "size":
        before = reports[0].size_bytes["before"]
        place = None if before is None else before / 2**20
    elif axis.key in SPEEDS:
        rates = [r.speeds[axis.key].before for r in group.results if axis.key in r.speeds]
        known = [rate for rate in rates if rate]
        place = 1e3 / (sum(known) / len(known)) if known else None
    if place is None or not math.isfinite(place):
        return
    panel.axvline(place, color=SERIES[2], linestyle=":", linewidth=1.2)
    panel.annotate(
        "dense", (place, 1), (-4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", rotation=90, color=INK,
    )  # fmt: skip
