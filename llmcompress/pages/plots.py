"""The pictures of one report: outlier profiles, choices and their errors, training and annealing, time and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llmcompress.core.profile import decoded
from llmcompress.pages.drawing import INK, SERIES, canvas, heat_colors, inline, placed
from llmcompress.pages.maps import kind_of
from llmcompress.report import GroupReport, Report

#: pictures of one sort on a page, points of a curve, and lines of a plot: of more, some that are evenly spread
PICTURES, POINTS, LINES = 8, 400, 100
#: letters of a title, and labels of an axis of choices
TITLE, LABELS = 20, 7
#: of a scale of peaks over their median, from 0.5 to at least the third of them
TICKS = [sign * 10**power for power in range(6) for sign in (1, 3)]
#: a decision's figures: key of the errors, key of what was chosen, its name
CHOICES = (
    ("clip_errors", "clip_ratio", "Clip ratio"),
    ("rho_errors", "rho", "Weight ρ of the range in the salience"),
    ("alpha_errors", "alpha", "Strength α of smoothing"),
)


@dataclass(frozen=True)
class Picture:
    """A plot with its heading and the sentence below it."""

    heading: str
    svg: Markup
    caption: str


def outlier_pictures(report: Report) -> list[Picture]:
    """Per kind of input, the channels' peaks over their block's median before smoothing, and after it, on one scale."""
    kinds = {
        kind: [(block, g.inputs) for block, g in groups if g.inputs.get("before")]
        for kind, groups in list(_groups(report).items())[:PICTURES]
    }
    panels = {kind: _panels(rows) for kind, rows in kinds.items() if rows}
    top = max((max(row) for p in panels.values() for v in p.values() for row in v if row), default=1.0)
    pictures = []
    for number, (kind, drawn) in enumerate(panels.items()):
        inputs = [i for _, i in kinds[kind]]
        worst = {w: max((i["outlier_ratio"].get(w, 0.0) for i in inputs), default=0.0) for w in ("before", "after")}
        said = f"Largest channel over the median one, worst block: {worst['before']:.1f}"
        said += f" before, {worst['after']:.1f} after smoothing." if worst["after"] else "; not smoothed."
        heading = f"Input of {kind}"
        svg = _outliers(drawn, inputs[0]["channels"], max(TICKS[2], top), f"outliers{_letter(number)}", heading, said)
        pictures.append(Picture(heading, svg, said))
    return pictures


def _outliers(
    panels: dict[str, list[list[float]]], channels: int, top: float, key: str, heading: str, said: str
) -> Markup:
    blocks = len(panels["before"])
    bins = max(len(row) for rows in panels.values() for row in rows)
    height = min(max(12.0 * blocks, 48.0), 240.0)
    below = 78
    total = len(panels) * (height + 28) + below
    with canvas(total) as figure:
        figure.set_layout_engine("none")  # every figure has the same parts, and to fit them takes longer than to draw
        for number, (when, rows) in enumerate(panels.items(), 1):
            axis = placed(figure, 42, total - number * (height + 28), 10, height)
            image = axis.imshow(
                [row if len(row) == bins else [math.nan] * bins for row in rows], aspect="auto", interpolation="none",
                cmap=heat_colors(), norm=LogNorm(0.5, top), extent=(0, channels, blocks - 0.5, -0.5),
            )  # fmt: skip
            axis.set_title(f"{when} smoothing" if len(panels) > 1 else "as they are")
            axis.set_ylabel("block")
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.spines[:].set_visible(False)
            axis.tick_params(labelbottom=number == len(panels))
        axis.set_xlabel("channel")
        scale = placed(figure, 42, below - 44, 10, 8)
        bar = figure.colorbar(image, cax=scale, orientation="horizontal", label="peak ÷ median peak")
        bar.ax.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= top]))
        bar.ax.xaxis.set_minor_locator(NullLocator())
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.outline.set_visible(False)
        return inline(figure, key, heading, said)


def _panels(rows: list[tuple[str, dict[str, Any]]]) -> dict[str, list[list[float]]]:
    """``before``, and ``after`` where something was smoothed: per block the peaks over their median."""
    found = {when: [_relative(peaks) for peaks in _by_block(rows, when)] for when in ("before", "after")}
    return {when: values for when, values in found.items() if any(values)}


def _by_block(rows: list[tuple[str, dict[str, Any]]], when: str) -> list[np.ndarray]:
    """The peaks per block; where several groups of a block are alike, as experts are, the highest of them."""
    found: dict[str, np.ndarray] = {}
    for block, inputs in rows:
        peaks = np.array(decoded(inputs[when]) if inputs.get(when) else [])
        earlier = found.get(block, peaks)
        found[block] = np.maximum(earlier, peaks) if len(earlier) == len(peaks) else max(earlier, peaks, key=len)
    return list(found.values())


def _relative(peaks: np.ndarray) -> list[float]:
    """Over their median."""
    return [float(p) for p in peaks / np.median(peaks)] if len(peaks) else []


def choice_pictures(report: Report) -> list[Picture]:
    """What was tried, input by input, by how much the error changed, and what was taken."""
    pictures = []
    for number, (errors, chosen, name) in enumerate(CHOICES):
        kinds = {
            kind: [g.figures for _, g in groups if len(g.figures.get(errors) or ()) > 1]
            for kind, groups in _groups(report).items()
        }
        kinds = dict(list({kind: found for kind, found in kinds.items() if found}.items())[:PICTURES])
        if not kinds:
            continue
        taken = [_taken(f, errors, chosen) for found in kinds.values() for f in found]
        counts = ", ".join(f"{t} for {taken.count(t)}" for t in dict.fromkeys(sorted(filter(None, taken))))
        said = f"One line an input, a dot at what was taken: {counts} of {len(taken)}."
        svg = _choices(kinds, errors, chosen, f"choice{_letter(number)}", name, said)
        pictures.append(Picture(name, svg, said))
    return pictures


def _choices(
    kinds: dict[str, list[dict[str, Any]]], errors: str, chosen: str, key: str, heading: str, said: str
) -> Markup:
    lines = -(-len(kinds) // 2)
    with canvas(30 + 118 * lines) as figure:
        axes = figure.subplots(lines, min(2, len(kinds)), squeeze=False, sharex=len(kinds) > 1).flat
        for axis, (kind, found) in zip(axes, kinds.items(), strict=False):
            for figures in found[:: -(-len(found) // LINES)]:
                _choice(axis, figures[errors], _taken(figures, errors, chosen))
            axis.set_title(kind.split(".")[-1][:TITLE])
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+.3g} %" if v else "0"))
            axis.tick_params(axis="x", rotation=90)
            axis.grid(axis="y")
        for axis in list(axes)[len(kinds) :]:
            axis.set_visible(False)
        figure.supylabel("change of the error", fontsize=11.5)
        return inline(figure, key, heading, said)


def _choice(axis: Axes, errors: dict[str, float | None], taken: str) -> None:
    known = {name: e for name, e in errors.items() if e is not None}
    base = next(iter(known.values()), 0.0) or 1.0
    change = [100 * (e / base - 1) for e in known.values()]
    places = range(len(known))
    labelled = places[:: -(-len(known) // LABELS)]
    axis.set_xticks(labelled, [list(known)[place][:TITLE] for place in labelled])
    axis.plot(places, change, color=SERIES[0], linewidth=0.9, alpha=0.6)
    if taken in known:
        at = list(known).index(taken)
        axis.plot([at], [change[at]], "o", color=SERIES[1], markersize=3.5)


def _taken(figures: dict[str, Any], errors: str, chosen: str) -> str:
    """The key among the errors that stands for the chosen value; empty if none does."""
    value = figures.get(chosen)
    if value is None:
        return "none" if "none" in figures[errors] else ""
    near = [name for name in figures[errors] if abs(_number(name) - value) <= 0.05 * abs(value)]
    return min(near, key=lambda name: abs(_number(name) - value), default="")


def _number(name: str) -> float:
    """NaN, which is near nothing, for what is none."""
    try:
        return float(name)
    except ValueError:
        return math.nan


def search_picture(report: Report) -> Picture | None:
    """Annealing: the perplexity of every candidate, the current and the least one."""
    moves = report.search.get("moves") or []
    if not moves:
        return None
    start, best = (report.search[key]["perplexity"] for key in ("start", "best"))
    rows = f"{len(report.search['validation_rows'])} of {report.search['rows']} calibration rows"
    said = f"Perplexity on {rows}: {start:.4f} at the start, {best:.4f} at the best of {len(moves)} moves."
    taken = report.search["best"]["ratios"]
    said += (
        f" Ratios block by block: {', '.join(f'{ratio:g}' for ratio in taken)}." if len(taken) <= POINTS // 10 else ""
    )
    numbers = list(range(1, len(moves) + 1))
    with canvas(220) as figure:
        axis = figure.subplots()
        for accepted, mark in ((True, "o"), (False, "x")):
            at = [(n, m["perplexity"]) for n, m in zip(numbers, moves, strict=True) if m["accepted"] is accepted]
            name = "accepted" if accepted else "rejected"
            axis.plot(*zip(*at, strict=True) if at else ([], []), mark, color=SERIES[2], markersize=3, label=name)
        current, least = ([m[key] for m in moves] for key in ("current", "best"))
        axis.step(numbers, current, color=SERIES[0], linewidth=1, where="post", label="current")
        axis.step(numbers, least, color=SERIES[1], linewidth=1.8, linestyle="--", where="post", label="best so far")
        axis.set_xlabel("move")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_ylabel("perplexity")
        axis.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1, handletextpad=0.4)
        return Picture("Annealing of the clip ratios", inline(figure, "annealing", "Annealing", said), said)


def sensitivity_picture(report: Report) -> Picture | None:
    """What zeros in each block alone cost the model, and the ratio it was given."""
    found = report.sensitivity
    if not found:
        return None
    ratios, cost = found["ratios"], list(zip(*found["kl"], strict=True))
    dearest = max(range(len(ratios)), key=cost[1].__getitem__)
    said = (
        f"Each block pruned alone: block {dearest} costs most, KL {cost[1][dearest]:.4f} at {found['tried'][1]:.0%}, "
        f"so it gets {ratios[dearest]:.0%}; the others up to {max(ratios):.0%}, all together {found['sparsity']:.1%}."
    )
    with canvas(220) as figure:
        costs, given = figure.subplots(2, 1, sharex=True)
        for values, share, colour, mark in zip(cost, found["tried"], SERIES, "os", strict=False):
            costs.plot(range(len(values)), values, mark, color=colour, markersize=4, label=f"at {share:.0%} zeros")
        costs.set_yscale("log")
        costs.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        costs.yaxis.set_minor_locator(NullLocator())
        costs.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        costs.set_ylabel("KL, alone")
        given.bar(range(len(ratios)), [100 * ratio for ratio in ratios], color=SERIES[0], width=0.8)
        given.axhline(100 * found["sparsity"], color=INK, linewidth=0.8)
        given.set_ylabel("zeros, %")
        given.set_xlabel("block")
        given.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for axis in (costs, given):
            axis.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1, handletextpad=0.4)
        return Picture("Zeros by sensitivity", inline(figure, "sensitivity", "Sensitivity of the blocks", said), said)


def recovery_picture(report: Report) -> Picture | None:
    """Training after a structured step: the divergence from the dense model at every step."""
    losses = report.recovery.get("loss") or []
    if not losses:
        return None
    said = (
        f"Divergence from the dense model on the rows trained on: {losses[0]:.4f} at first, {losses[-1]:.4f} after "
        f"{len(losses)} steps ({report.recovery['kind']})."
    )
    stride = -(-len(losses) // POINTS)
    steps = list(range(1, len(losses) + 1))[::stride]
    with canvas(190) as figure:
        axis = figure.subplots()
        axis.plot(steps, losses[::stride], color=SERIES[0], linewidth=1.4)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_ylabel("KL, nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        return Picture("Recovery", inline(figure, "recovery", "Recovery", said), said)


def cost_picture(report: Report) -> Picture | None:
    """Seconds of every block, and the highest memory up to its end."""
    seconds = [block.seconds for block in report.blocks]
    if not any(seconds):
        return None
    peaks = [(i, b.peak_memory_bytes / 2**20) for i, b in enumerate(report.blocks) if b.peak_memory_bytes]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    said = f"{sum(seconds):.1f} s in {len(seconds)} blocks, {seconds[slowest]:.2f} s in the slowest, block {slowest}"
    said += f"; {peaks[0][1]:.0f} MiB at most in the first, {peaks[-1][1]:.0f} up to the last." if peaks else "."
    with canvas(220 if peaks else 140) as figure:
        axes: list[Axes] = list(figure.subplots(2 if peaks else 1, 1, squeeze=False, sharex=True)[:, 0])
        axes[0].bar(range(len(seconds)), seconds, color=SERIES[0], width=0.8)
        axes[0].set_ylabel("seconds")
        if peaks:
            axes[1].step(*zip(*peaks, strict=True), where="mid", color=SERIES[1], linewidth=1.6)
            axes[1].set_ylim(0, 1.15 * peaks[-1][1])
            axes[1].set_ylabel("highest MiB")
        for axis in axes:
            axis.grid(axis="y")
            axis.yaxis.set_major_locator(MaxNLocator(4))
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes[-1].set_xlabel("block")
        return Picture("Block by block", inline(figure, "blocks", "Time and memory of the blocks", said), said)


def _groups(report: Report) -> dict[str, list[tuple[str, GroupReport]]]:
    """(block's name, group) by kind of input."""
    found: dict[str, list[tuple[str, GroupReport]]] = {}
    for block in report.blocks:
        for group in block.groups:
            found.setdefault(kind_of(group.name, block.name), []).append((block.name, group))
    return found


def _letter(number: int) -> str:
    return chr(ord("a") + number)
