"""The records of `table_jsq` as Markdown and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
#: mark and colour of each method, the same in every plot
STYLES = {
    "Wanda": ("o", "C0"), "SparseGPT": ("s", "C1"), "LLM-Pruner": ("X", "black"), "SmoothQuant": ("P", "C6"),
    "LLM-Pruner + SmoothQuant": ("D", "C4"), "OmniQuant": ("<", "C8"), "Wanda + SmoothQuant": ("^", "C2"),
    "SparseGPT + SmoothQuant": ("v", "C3"), "JSQ": ("p", "C5"), "OBR": (">", "C7"), "JSQ-plus": ("*", "C9"),
}  # fmt: skip
#: between two methods at a budget, which is 1 wide
APART = 0.1


def markdown(found: dict[str, Any]) -> str:
    """One table per budget, methods in the order of their divergence on the first text; spread is one deviation."""
    dense, cells = found["dense"], found["cells"]
    texts = list(dense["texts"])
    lines = [f"# {Path(dense['model']).name}, methods by budget", "", *_preamble(dense, cells), ""]
    for budget in _in_order(cells, "budget"):
        lines += [f"## {budget}", "", *_header(texts)]
        here = [c for c in cells if c["budget"] == budget]
        met = [c for c in here if "refused" not in c]
        rows = [[c for c in met if c["method"] == method] for method in _in_order(met, "method")]
        rows.sort(key=lambda row: mean(c["texts"][texts[0]]["kl"] for c in row))
        lines += [_row(row, texts) for row in rows] + [""]
        reasons = dict.fromkeys(f"{c['method']}: {c['refused']}" for c in here if "refused" in c)
        lines += [line for reason in reasons for line in (reason, "")]
    return "\n".join(lines)


def _preamble(dense: Record, cells: list[Record]) -> list[str]:
    seeds = len({c["seed"] for c in cells})
    quality = "; ".join(
        f"{name} ({f['tokens']} tokens, {f['words'] or 'no'} words): perplexity {_fixed(f['perplexity'], 3)} "
        f"per token, {_fixed(f['word_perplexity'], 1)} per word"
        for name, f in dense["texts"].items()
    )
    rows = cells[0]["settings"]["calibration"]["rows"] if cells else [0, 0]
    return [
        f"Dense: {quality}; {dense['size_bytes'] / 2**20:.2f} MiB, {_millions(dense['macs'])} million "
        "multiply-accumulates per token in the blocks' matrices.",
        "",
        f"Calibrated on {rows[0]} × {rows[1]} tokens, {seeds} seed{'s, mean ± deviation' if seeds > 1 else ''}. "
        "KL is that of the dense model's predictions from the compressed model's, nats per token. Size is that of all "
        "weights on disk; bits, zeros and multiply-accumulates (in millions per token: all, and with weights that are "
        "not zero) are those of the blocks' matrices. A dash stands for what is not defined.",
    ]


def _header(texts: list[str]) -> list[str]:
    quality = [column for text in texts for column in (f"KL {text}", "per token", "per word")]
    heads = ["method", *quality, "MiB", "bits", "zeros", "MACs", "nonzero", "seconds"]
    return ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]


def _row(cells: list[Record], texts: list[str]) -> str:
    figures = []
    for text in texts:
        for key, digits in (("kl", 4), ("perplexity", 3), ("word_perplexity", 1)):
            figures.append(_spread([c["texts"][text][key] for c in cells], digits))

    def of(key: str) -> float:
        return mean(c[key] for c in cells)

    zeros = f"{of('sparsity'):.2%}" if cells[0]["removed"] is None else f"{of('removed'):.2%} removed"
    cost = [f"{of('safetensors_bytes') / 2**20:.2f}", f"{of('effective_bits'):.2f}", zeros]
    counts = [_millions(of("macs")), _millions(of("nonzero_macs")), f"{of('seconds'):.1f}"]
    return "| " + " | ".join([cells[0]["method"], *figures, *cost, *counts]) + " |"


def _spread(values: list[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return "–"
    return _fixed(mean(known), digits) + (f" ± {_fixed(stdev(known), digits)}" if len(known) > 1 else "")


def _fixed(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.2e}"


def _millions(count: float) -> str:
    return f"{count / 1e6:.3f}" if count < 1e8 else f"{count / 1e6:.0f}"


def _in_order(cells: list[Record], key: str) -> list[str]:
    return list(dict.fromkeys(c[key] for c in cells))


def plot(found: dict[str, Any], file: Path) -> None:
    """Divergence by budget, a panel per text and a mark per method; bars span the seeds."""
    cells = [c for c in found["cells"] if "refused" not in c]
    texts = list(found["dense"]["texts"])
    budgets, methods = _in_order(cells, "budget"), _in_order(cells, "method")
    figure = Figure(figsize=(max(7.0, 1.5 + 1.15 * len(budgets)), 3.6 * len(texts) + 1.2), layout="constrained")
    panels = figure.subplots(len(texts), 1, squeeze=False, sharex=True)[:, 0]
    for panel, text in zip(panels, texts, strict=True):
        _panel(panel, text, cells, budgets, methods)
    panels[-1].set_xticks(range(len(budgets)), budgets, rotation=20, ha="right")
    panels[0].set_title(f"{Path(found['dense']['model']).name}: what is lost at each budget", loc="left")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def _panel(panel: Any, text: str, cells: list[Record], budgets: list[str], methods: list[str]) -> None:
    for method in methods:
        known: list[tuple[float, list[float]]] = []
        for place, budget in enumerate(budgets):
            row = [c["texts"][text]["kl"] for c in cells if (c["method"], c["budget"]) == (method, budget)]
            there = [m for m in methods if any((c["method"], c["budget"]) == (m, budget) for c in cells)]
            if row and all(math.isfinite(v) for v in row):
                known.append((place + (there.index(method) - (len(there) - 1) / 2) * APART, row))
        if not known:
            continue
        middle: Callable[[list[float]], float] = mean
        mark, color = STYLES[method]
        spans = [[middle(row) - min(row) for _, row in known], [max(row) - middle(row) for _, row in known]]
        panel.errorbar(
            [x for x, _ in known], [middle(row) for _, row in known], yerr=spans,
            label=method, fmt=mark, color=color, markersize=6,
        )  # fmt: skip
    for edge in range(1, len(budgets)):
        panel.axvline(edge - 0.5, color="0.9", linewidth=0.8, zorder=0)
    panel.set_xlim(-0.5, len(budgets) - 0.5)
    panel.set_yscale("log")
    panel.set_ylabel(f"KL, nats per token\n{text}")
    panel.grid(axis="y", color="0.9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
