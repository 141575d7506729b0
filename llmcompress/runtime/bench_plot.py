"""The table of a bench as a plot: bars of prefill, decode and memory, one row per variant. Bars are medians; lines on
them reach from the lowest to the highest."""

from __future__ import annotations

from pathlib import Path

from llmcompress.runtime.bench import Variant


def draw(variants: list[Variant], file: Path) -> bool:
    """Writes a PNG of the first batch size.

    Returns:
        False where matplotlib is not installed: nothing is written then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    batch = variants[0].job.batches[0]
    panels = {
        f"prefill, tokens/s (batch {batch})": [v.rates("prefill", batch) for v in variants],
        f"decode, tokens/s (batch {batch})": [v.rates("decode", batch) for v in variants],
        "resident memory, GiB": [_gibibytes(v) for v in variants],
    }
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(variants)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, figures) in zip(axes, panels.items(), strict=True):
        values = [found["median"] for found in figures]
        ends = [[f["median"] - f["low"] for f in figures], [f["high"] - f["median"] for f in figures]]
        bars = axis.barh([v.name for v in variants], values, color="#4878a8", xerr=ends, ecolor="#8a8a8a")
        axis.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("bars: medians of the rounds; lines: lowest to highest", fontsize=9)
    figure.savefig(file, dpi=120)
    return True


def _gibibytes(variant: Variant) -> dict[str, float]:
    found = [one.resident_bytes / 2**30 for one in variant.rounds]
    return {"median": variant.resident() / 2**30, "low": min(found), "high": max(found)}
