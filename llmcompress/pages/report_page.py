"""``report.html``: the figures of ``report.json`` as tables and pictures, with what made them and what to try next.

Pictures are drawn when the page is made; tables are filled in at the end, so that they can hold what drawing took."""

from __future__ import annotations

from typing import Any

from llmcompress.pages.advice import advice, outstanding
from llmcompress.pages.listing import listed, phase_rows
from llmcompress.pages.maps import bits_map, error_map, per_cent, short_block, zeros_map
from llmcompress.pages.plots import (
    choice_pictures,
    cost_picture,
    outlier_pictures,
    recovery_picture,
    search_picture,
    sensitivity_picture,
)
from llmcompress.pages.results import SPEEDS, Result
from llmcompress.pages.template import filled
from llmcompress.report import Report
from llmcompress.savings import COLUMNS, Saving
from llmcompress.table import bytes_text, change, grouped_warnings, rows_text

#: inputs of which the outliers are listed
INPUTS_LISTED = 12
#: pictures of what went before the blocks were compressed
_BEFORE_THE_WALK = (recovery_picture, sensitivity_picture, search_picture)


class ReportPage:
    """The page of one report.

    Args:
        result: a compressed folder; the figures of time in its report may still change until `html` is called.
    """

    def __init__(self, result: Result) -> None:
        self.result, report = result, result.report
        self._outliers = outlier_pictures(report)
        choices = [*choice_pictures(report), *(draw(report) for draw in _BEFORE_THE_WALK)]
        self._choices = [picture for picture in choices if picture is not None]
        self._cost = cost_picture(report)

    def html(self) -> str:
        """The whole file. The same result gives the same text."""
        result, report = self.result, self.result.report
        matrices = listed(report.matrices)
        return filled(
            "report.html",
            title=f"{report.model}, {report.recipe}",
            name=report.model.rstrip("/").split("/")[-1] if report.model.startswith(("/", ".", "~")) else report.model,
            report=report,
            tiles=_tiles(report),
            judged_on=rows_text(report.evaluation) if report.evaluation else "",
            headline=[*report.headline(), *_speed_rows(result)],
            judged=[item.cells() for item in result.judged],
            limited=result.limited,
            savings=[Saving(**saving).cells for saving in report.savings],
            saving_columns=COLUMNS,
            advice=advice(report),
            warnings=[line.removeprefix("warning: ") for line in grouped_warnings(report.to_dict()["warnings"])],
            maps=_maps(report),
            outstanding=outstanding(report),
            outliers=self._outliers,
            inputs=_inputs(report),
            refused=any(reason for *_, reason in _inputs(report)),
            choices=self._choices,
            cost=self._cost,
            phases=phase_rows(report.seconds_by_phase, report.seconds),
            matrices=matrices,
            unlisted=len(report.matrices) - len(matrices),
            command=result.command,
            recipe=result.recipe,
            facts=_facts(report),
            short_block=short_block,
            per_cent=per_cent,
        )


def report_page(result: Result) -> str:
    """The page at once."""
    return ReportPage(result).html()


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(figure, what it is, beside it) of the few that matter most."""
    size, perplexity = report.size_bytes, report.perplexity
    tiles = []
    if change(size):
        tiles.append(
            (change(size), "size of the weights", f"{bytes_text(size['before'])} → {bytes_text(size['after'])}")
        )
    if change(perplexity):
        between = f"{perplexity['before']:.2f} → {perplexity['after']:.2f}"
        tiles.append((change(perplexity), "perplexity per token", between))
    if report.kl_divergence is not None:
        spread = "" if report.kl_stderr is None else f"standard error {report.kl_stderr:.2g}"
        tiles.append((f"{report.kl_divergence:.5f}", "KL from the dense model, nats per token", spread))
    if report.top1_agreement is not None:
        tiles.append((f"{report.top1_agreement:.1%}", "same most likely token", ""))
    peak = f"peak memory {bytes_text(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    tiles.append((f"{report.seconds:.1f} s", "to make it", peak))
    return tiles


def _speed_rows(result: Result) -> list[list[str]]:
    rows = []
    for kind in SPEEDS:
        speed = result.speeds.get(kind)
        if speed is not None:
            before = "" if speed.before is None else f"{speed.before:.1f}"
            ratio = change({"before": speed.before, "after": speed.after})
            rows.append([f"{kind}, tokens per second", before, f"{speed.after:.1f}", ratio])
    return rows


def _maps(report: Report) -> list[dict[str, Any]]:
    without_rows = report.calibration.get("samples") == 0
    measure = "‖W − Q‖² ÷ ‖W‖², as no rows were read" if without_rows else "‖W X − Q X̂‖² ÷ ‖W X‖² on calibration rows"
    error = f"{measure}; the colour is its logarithm."
    bits = "As stored, scales included; zeros are stored like other weights."
    found = [
        ("errors", "Relative error", error, error_map(report)),
        ("zeros", "Zeros", "Share of weights that are exactly zero.", zeros_map(report)),
        ("bits", "Stored", bits, bits_map(report)),
    ]
    return [
        {"key": key, "heading": f"{what}, {shown.unit}", "caption": caption, "map": shown}
        for key, what, caption, shown in found if shown is not None
    ]  # fmt: skip


def _inputs(report: Report) -> list[tuple[str, float, float | None, str]]:
    """(group, outlier ratio before, after smoothing, why it was not smoothed), those of the largest ratios."""
    found = []
    for block in report.blocks:
        for group in block.groups:
            ratios = group.inputs.get("outlier_ratio") or {}
            if ratios.get("before") is not None:
                found.append((group.name, ratios["before"], ratios.get("after"), group.fold_refusal))
    return sorted(found, key=lambda row: -row[1])[:INPUTS_LISTED]


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [("model", report.model), ("recipe", report.recipe), ("seed", str(report.seed))]
    for name, rows in (("calibrated on", report.calibration), ("judged on", report.evaluation)):
        if rows:
            facts.append((name, rows_text(rows)))
    if report.structure:
        kept = ", ".join(f"{n} of {total} {kind}" for kind, (n, total) in report.structure["kept per block"].items())
        facts.append(("kept in every block", kept))
    facts += [("written to", report.output)] if report.output else []
    return [*facts, *sorted(report.versions.items())]
