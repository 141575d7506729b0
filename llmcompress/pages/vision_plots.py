"""The pictures of a report on images: layers in order with their errors, zeros and bits; channels kept; training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from llmcompress.pages.drawing import SERIES, canvas, inline
from llmcompress.pages.listing import listed
from llmcompress.pages.maps import per_cent
from llmcompress.pages.plots import Picture
from llmcompress.report import MatrixReport
from llmcompress.vision.report import VisionReport

#: layers or spaces of a picture; of more, those of the largest errors, or the first
SHOWN = 60
#: letters of a layer's name, from its end
LETTERS = 26
#: share of zeros in a layer below which there is nothing to show
FEW = 0.05
_LINE = 15.0


def layer_pictures(report: VisionReport) -> list[Picture]:
    """Errors, and zeros and bits where there are any to tell of."""
    layers = by_layer(report.matrices)
    shown = listed(layers, SHOWN)
    some = "" if len(shown) == len(layers) else f" {len(shown)} of {len(layers)} layers, those of the largest errors."
    known = [m.relative_error for m in layers if m.relative_error]
    pictures = []
    if known:
        worst = max(layers, key=lambda m: m.relative_error or 0.0)
        before = ", before the layers were trained" if report.trainings else ""
        said = (
            f"‖W X − Q X̂‖² ÷ ‖W X‖² on calibration images{before}; the scale is logarithmic. "
            f"Median {per_cent(median(known))} %, most {per_cent(max(known))} % in {worst.name}.{some}"
        )
        pictures.append(_errors(shown, said))
    if max((m.sparsity for m in layers), default=0.0) >= FEW:
        said = f"Share of weights that are exactly zero, {report.sparsity:.1%} of all.{some}"
        pictures.append(_bars("Zeros, layer by layer", "zeros", shown, lambda m: 100 * m.sparsity, "%", said, 100.0))
    if any(m.bits < 32 for m in layers):
        said = f"As stored, scales included; {report.effective_bits:.2f} on average.{some}"
        top = max(m.bits for m in shown)
        pictures.append(_bars("Bits per weight, layer by layer", "bits", shown, lambda m: m.bits, "bits", said, top))
    return pictures


def by_layer(matrices: Sequence[MatrixReport]) -> list[MatrixReport]:
    """The groups of a convolution, reported one by one, as one layer: the worst error, the mean of the rest."""
    found: dict[str, list[MatrixReport]] = {}
    for matrix in matrices:
        found.setdefault(matrix.name.partition("[")[0], []).append(matrix)
    layers = []
    for name, parts in found.items():
        total = sum(m.weights for m in parts)
        errors = [m.relative_error for m in parts if m.relative_error is not None]
        zeros, bits = (sum(value(m) * m.weights for m in parts) / total for value in (_zeros, _bits))
        shape = (sum(m.shape[0] for m in parts), parts[0].shape[1])
        layers.append(MatrixReport(name, shape, zeros, bits, max(errors) if errors else None))
    return layers


def channel_picture(report: VisionReport) -> Picture | None:
    """Channels before and after, space by space."""
    spaces = report.channels[:SHOWN]
    if not spaces:
        return None
    before, after = (sum(s[key] for s in report.channels) for key in ("before", "after"))
    said = f"{after} of {before} channels stay. A line is named by the first of the layers that share its channels."
    said += f" The first {len(spaces)} of {len(report.channels)}." if len(spaces) < len(report.channels) else ""
    with canvas(_LINE * len(spaces) + 60) as figure:
        axis, places = figure.subplots(), range(len(spaces))
        axis.barh(places, [s["before"] for s in spaces], color=SERIES[2], alpha=0.35, height=0.72, label="before")
        axis.barh(places, [s["after"] for s in spaces], color=SERIES[0], height=0.42, label="after")
        for place, space in zip(places, spaces, strict=True):
            axis.annotate(
                f"{space['after']} of {space['before']}", (space["before"], place), (4, 0),
                textcoords="offset points", va="center", fontsize=9.5,
            )  # fmt: skip
        axis.set_yticks(places, [_short(s["name"]) for s in spaces])
        axis.set_ylim(len(spaces) - 0.4, -0.6)
        axis.set_xlim(0, 1.25 * max(s["before"] for s in spaces))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1, handletextpad=0.4)
        return Picture("Channels kept", inline(figure, "channels", "Channels kept", said), said)


def training_pictures(report: VisionReport) -> list[Picture]:
    """The loss of each training, epoch by epoch, and the sparsity that grew in it."""
    pictures = []
    for number, training in enumerate(report.trainings):
        losses, ratios = training["loss"], training.get("sparsity")
        said = (
            f"{training['epochs']} epochs on {training['images']} images, {training['learn']}: loss {losses[0]:.3g} at "
            f"first, {losses[-1]:.3g} in the end."
        )
        said += f" Sparsity in {len(ratios)} rounds: {', '.join(f'{r:.0%}' for r in ratios)}." if ratios else ""
        heading, key = f"Training {training['what']}", f"training{chr(ord('a') + number)}"
        with canvas(170) as figure:
            axis, epochs = figure.subplots(), range(1, len(losses) + 1)
            axis.plot(epochs, losses, "o-", color=SERIES[0], linewidth=1.4, markersize=3.5)
            axis.set_xlabel("epoch")
            axis.set_ylabel("mean loss")
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.grid(axis="y")
            pictures.append(Picture(heading, inline(figure, key, heading, said), said))
    return pictures


def _errors(layers: list[MatrixReport], said: str) -> Picture:
    heading = "Relative error, layer by layer"
    with canvas(_LINE * len(layers) + 48) as figure:
        axis, places = figure.subplots(), range(len(layers))
        axis.hlines(places, 0, 1, transform=axis.get_yaxis_transform(), color=SERIES[2], alpha=0.25, linewidth=0.6)
        known = [(100 * m.relative_error, i) for i, m in enumerate(layers) if m.relative_error]
        axis.plot(*zip(*known, strict=True), "o", color=SERIES[1], markersize=5)
        axis.set_xscale("log")
        low, high = min(e for e, _ in known), max(e for e, _ in known)
        axis.set_xlim(low / 2, high * 2)
        few = high / low < 10
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=7))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
        _name_lines(axis, layers)
        return Picture(heading, inline(figure, "errors", heading, said), said)


def _bars(
    heading: str, key: str, layers: list[MatrixReport], value: Callable[[MatrixReport], float], unit: str, said: str,
    top: float,
) -> Picture:  # fmt: skip
    with canvas(_LINE * len(layers) + 48) as figure:
        axis, values = figure.subplots(), [value(m) for m in layers]
        axis.barh(range(len(layers)), values, color=SERIES[0], height=0.62)
        for place, number in enumerate(values):
            axis.annotate(
                f"{number:.3g}", (number, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5
            )
        axis.set_xlim(0, 1.12 * top)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x")
        _name_lines(axis, layers)
        return Picture(heading, inline(figure, key, heading, said), said)


def _name_lines(axis: object, layers: list[MatrixReport]) -> None:
    axis.set_yticks(range(len(layers)), [_short(m.name) for m in layers])  # type: ignore[attr-defined]
    axis.set_ylim(len(layers) - 0.4, -0.6)  # type: ignore[attr-defined]


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def _zeros(matrix: MatrixReport) -> float:
    return matrix.sparsity


def _bits(matrix: MatrixReport) -> float:
    return matrix.bits
