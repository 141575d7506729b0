"""The table of a bench as a plot: bars of prefill, decode and memory, one row per variant."""

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
        f"prefill, tokens/s (batch {batch})": [v.rate("prefill", batch) for v in variants],
        f"decode, tokens/s (batch {batch})": [v.rate("decode", batch) for v in variants],
        "resident memory, GiB": [v.resident() / 2**30 for v in variants],
    }
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(variants)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh([v.name for v in variants], values, color="#4878a8")
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=120)
    return True
