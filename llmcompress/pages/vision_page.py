"""``report.html`` of a convolutional network: the figures of ``report.json`` as tables and pictures."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import UserError
from llmcompress.pages.listing import listed, phase_rows
from llmcompress.pages.results import read_making
from llmcompress.pages.template import filled
from llmcompress.pages.vision_advice import vision_advice
from llmcompress.pages.vision_plots import channel_picture, layer_pictures, training_pictures
from llmcompress.table import bytes_text, change, grouped_warnings
from llmcompress.vision.report import VisionReport


def vision_page(report: VisionReport, recipe: str = "", command: str = "") -> str:
    """The whole file. The same report gives the same text.

    Args:
        recipe: as YAML.
        command: the command line that made it.
    """
    matrices, kept = listed(report.matrices), channel_picture(report)
    return filled(
        "vision.html",
        title=f"{report.model}, {report.recipe}",
        name=report.model.rstrip("/").split("/")[-1] or report.model,
        report=report,
        tiles=_tiles(report),
        headline=report.headline(),
        warnings=[line.removeprefix("warning: ") for line in grouped_warnings(report.warnings)],
        advice=vision_advice(report),
        layers=layer_pictures(report),
        kept=kept,
        trainings=training_pictures(report),
        latency=_latency(report),
        exports=_exports(report),
        phases=phase_rows(report.seconds_by_phase, report.seconds),
        matrices=matrices,
        unlisted=len(report.matrices) - len(matrices),
        command=command,
        recipe=recipe,
        facts=_facts(report),
    )


def read_vision(folder: Path) -> str:
    """The page of a folder that the command ``vision`` wrote.

    Raises:
        UserError: there is no report in it, or one that is damaged.
    """
    file = folder / "report.json"
    try:
        report = VisionReport.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = f"no report of the command vision can be read ({' '.join(str(error).split())[:160]})"
        raise UserError(said, str(file), "give a folder that `python -m llmcompress vision` wrote") from None
    return vision_page(report, *read_making(folder))


def _tiles(report: VisionReport) -> list[tuple[str, str, str]]:
    """(figure, what it is, beside it) of the few that matter most."""
    tiles, accuracy, size, macs = [], report.accuracy, report.size_bytes, report.macs
    if accuracy["after"] is not None:
        points = 100 * (accuracy["after"] - (accuracy["before"] or 0.0))
        beside = f"{points:+.2f} points from {accuracy['before'] or 0.0:.2%}"
        tiles.append((f"{accuracy['after']:.2%}", "accuracy on held-out images", beside))
    elif report.agreement is not None:
        tiles.append((f"{report.agreement:.2%}", "same class as the dense network", ""))
    if change(size):
        between = f"{bytes_text(size['before'])} → {bytes_text(size['after'])}"
        tiles.append((change(size), "size of the weights", between))
    if macs and macs["after"] != macs["before"]:
        between = f"{macs['before'] / 1e6:.3g} → {macs['after'] / 1e6:.3g} million"
        tiles.append((change(macs), "multiplications per image", between))
    if report.latency:
        tiles.append((f"{report.latency['measured'] - 1:+.1%}", "measured float32 latency", ""))
    if report.effective_bits is not None and report.effective_bits < 32:
        tiles.append((f"{report.effective_bits:.2f}", "bits per compressed weight", "scales included"))
    if report.sparsity is not None and report.sparsity >= 0.01:
        tiles.append((f"{report.sparsity:.1%}", "zeros in compressed weights", ""))
    peak = f"peak memory {bytes_text(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    tiles.append((f"{report.seconds:.1f} s", "to make it", peak))
    return tiles


def _latency(report: VisionReport) -> list[tuple[str, str, str]]:
    """(of what, milliseconds, share of the dense network's)."""
    if not report.latency:
        return []
    found, dense = report.latency, report.latency["dense_seconds"]
    shares = [("dense, measured", 1.0), *((name, found[name]) for name in ("target", "predicted", "measured"))]
    return [(name, f"{1e3 * dense * share:.2f} ms", f"{share:.1%}") for name, share in shares]


def _exports(report: VisionReport) -> list[tuple[str, str, str, str]]:
    return [(e["file"], bytes_text(e["bytes"]), f"{e['difference']:.1e}", e["holds"]) for e in report.exports]


def _facts(report: VisionReport) -> list[tuple[str, str]]:
    facts = [("model", report.model), ("recipe", report.recipe), ("seed", str(report.seed))]
    if report.data:
        facts.append(("images", f"{report.data['source']}: calibrated on {report.data['calibration']}, "
                                f"judged on {report.data['held out']} held out"))  # fmt: skip
    if report.fold:
        facts.append(
            ("norms folded", f"{report.fold['pairs']}, relative change of the logits {report.fold['error']:.1e}")
        )
        facts += [(f"{name} stays", reason) for name, reason in report.fold["refused"].items()]
    if report.removal_error is not None:
        facts.append(("removal against zeroing", f"logits differ by {report.removal_error:.1e}"))
    facts += [("written to", report.output)] if report.output else []
    return [*facts, *sorted(report.versions.items())]
