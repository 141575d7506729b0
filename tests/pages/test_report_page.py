"""The page of a report holds its figures, is safe to open, and is the same for the same report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.core.sparsity import Sparsity
from llmcompress.pages.drawing import cell_colors
from llmcompress.pages.maps import error_map, per_cent
from llmcompress.pages.report_page import ReportPage, report_page
from llmcompress.pages.results import Speed
from llmcompress.report import Report
from llmcompress.savings import savings
from tests.pages.reports import HOSTILE, KINDS, Page, example, result, write


@pytest.fixture(scope="module")
def source() -> str:
    return report_page(result())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_headline_is_the_reports(page: Page) -> None:
    assert page.tables["headline"][1:] == example().headline()


def test_every_matrix_is_there_with_its_figures(page: Page) -> None:
    rows = {row[0]: row for row in page.tables["matrices"][1:]}
    matrices = example().matrices
    assert list(rows) == [m.name for m in matrices]
    for m in matrices:
        _, shape, bits, zeros, error = rows[m.name]
        assert shape == f"{m.shape[0]} × {m.shape[1]}"
        assert float(bits) == pytest.approx(m.bits, abs=6e-4)
        assert float(zeros.rstrip(" %")) == pytest.approx(100 * m.sparsity, abs=5e-3)
        assert float(error) == pytest.approx(m.relative_error, rel=1e-3)


def test_the_maps_have_a_cell_for_every_matrix_of_every_block(page: Page) -> None:
    report = example()
    for name, attribute, digits in (("errors", "relative_error", 0.06), ("zeros", "sparsity", 0.5)):
        head, *rows = page.tables[name]
        assert head == ["block", *(kind.split(".")[-1] for kind in KINDS)]
        assert [row[0] for row in rows] == [str(i) for i in range(len(report.blocks))]
        for row, block in zip(rows, report.blocks, strict=True):
            shown = [float(cell) / 100 for cell in row[1:]]
            meant = [getattr(m, attribute) for m in block.matrices]
            assert shown == pytest.approx(meant, rel=digits, abs=0.006)
    assert {cell for row in page.tables["bits"][1:] for cell in row[1:]} == {"8.06"}


def test_the_phases_and_what_none_of_them_counts_add_up_to_the_run(page: Page) -> None:
    seconds = {name: float(value.removesuffix(" s")) for name, *_, value in page.tables["phases"]}
    assert seconds == {"compress": 8.25, "load": 1.5, "other": 2.75}


def test_command_recipe_warnings_and_versions_are_there(page: Page) -> None:
    made = result()
    assert page.parts == {"command": made.command, "recipe": made.recipe}
    assert "damping raised (3 times)" in page.text
    facts = dict(page.tables["facts"])
    assert facts["torch"] == "2.13.0" and facts["judged on"] == "4 × 64 tokens of its own samples"


def test_outlier_ratios_are_those_of_the_report(page: Page) -> None:
    found = {g.name: g for b in example().blocks for g in b.groups}
    for name, before, after, reason in page.tables["inputs"][1:]:
        ratios = found[name].inputs["outlier_ratio"]
        assert before == f"{ratios['before']:.1f} ×" and reason == found[name].fold_refusal
        assert after == (f"{ratios['after']:.1f} ×" if "after" in ratios else "–")


def test_seconds_that_are_known_late_are_shown() -> None:
    report = Report("m", "r")
    drawn = ReportPage(result(report))
    report.seconds, report.seconds_by_phase = 99.5, {"page": 99.5}
    assert Page(drawn.html()).tables["phases"] == [["page", "", "99.50 s"]]


def test_measured_speeds_join_the_headline() -> None:
    page = Page(report_page(result(Report("m", "r"), speeds={"decode": Speed(90.0, 45.0)}, machine="a machine")))
    assert page.tables["headline"][-1] == ["decode, tokens per second", "45.0", "90.0", "+100.0%"]


def test_names_cannot_become_markup() -> None:
    report = example(name=HOSTILE)
    report.recipe = report.output = HOSTILE
    report.warnings = [HOSTILE]
    report.calibration["source"] = HOSTILE
    report.versions[HOSTILE] = HOSTILE
    for block in report.blocks:
        block.name += HOSTILE
        for item in (*block.matrices, *block.groups):
            item.name = f"{block.name}.{item.name}{HOSTILE}"
        for group in block.groups:
            group.fold_refusal = HOSTILE
            group.figures["clip_errors"] = {HOSTILE: 0.5, "5e-05": 0.25}
    page = Page(report_page(result(report, command=HOSTILE, recipe=HOSTILE)))
    assert not {"script", "img", "iframe", "object", "form"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.parts["command"] == HOSTILE and HOSTILE in page.text
    assert dict(page.tables["facts"])["model"] == HOSTILE


def test_nothing_in_the_page_asks_for_anything_outside(source: str, page: Page) -> None:
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert value.startswith(("#", "data:")), (name, value[:80])
        assert not re.search(r"url\((?!['\"]?(#|data:))", value)
    assert "@import" not in source and "script" not in page.tags
    policy = next(v for tag, n, v in page.attributes if tag == "meta" and n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy


def test_names_of_parts_are_unique_and_references_find_them(source: str, page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {v[1:] for _, n, v in page.attributes if n in ("href", "xlink:href") and v.startswith("#")}
    wanted |= {word for _, n, v in page.attributes if n == "aria-labelledby" for word in v.split()}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", source))
    assert wanted <= set(ids)


def test_every_picture_says_what_it_shows(source: str, page: Page) -> None:
    pictures = [v for tag, name, v in page.attributes if tag == "svg" and name == "role"]
    assert len(pictures) == 4 + 2 + 1 + 1 + 1 and set(pictures) == {"img"}
    assert len(re.findall(r"<svg [^>]*><title id=[^>]*>[^<]+</title><desc id=[^>]*>[^<]+</desc>", source)) == 9


def test_the_same_report_gives_the_same_bytes_in_another_process(source: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "made", example())
    made = result()
    (folder / "recipe.yaml").write_text(made.recipe, encoding="utf-8")
    (folder / "llmcompress.json").write_text(json.dumps({"command": made.command}), encoding="utf-8")
    command = [sys.executable, "-m", "llmcompress", "report", str(folder)]
    environment = dict(os.environ) | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], capture_output=True)
    assert (folder / "report.html").read_text(encoding="utf-8") == source


def test_a_report_of_nothing_is_a_page() -> None:
    page = Page(report_page(result(Report("m", "r"), command="", recipe="")))
    assert "No divergence from the dense model was measured" in page.text and "svg" not in page.tags


def test_a_large_model_makes_no_large_page() -> None:
    report = example(blocks=80, experts=5)
    page = report_page(result(report))
    assert len(report.matrices) > 700 and len(page) < 1_500_000
    assert len(Page(page).tables["matrices"]) == 701 and len(Page(page).tables["errors"]) == 81


def test_of_alike_matrices_in_a_block_the_map_shows_the_worst() -> None:
    report = example(experts=5)
    shown = error_map(report)
    assert shown is not None and shown.columns[-1] == "mlp.experts.*.up_proj"
    for (_, cells), block in zip(shown.rows, report.blocks, strict=True):
        worst = max(m.relative_error or 0 for m in block.matrices if "experts" in m.name)
        assert cells[-1].text == per_cent(worst)


@pytest.mark.parametrize(("scale", "unit"), [(1.0, "%"), (1e-3, "10⁻³ %"), (1e-6, "10⁻⁶ %")])
def test_small_errors_have_a_unit_in_which_they_are_short(scale: float, unit: str) -> None:
    report = example()
    for matrix in report.matrices:
        matrix.relative_error = 0.01 * scale
    shown = error_map(report)
    assert shown is not None and shown.unit == unit
    assert {cell.text for _, cells in shown.rows for cell in cells} == {"1"}


def test_the_page_says_on_what_was_judged_and_where_savings_are_real() -> None:
    report = example()
    report.savings = [asdict(saving) for saving in savings([], Sparsity.parse("2:4"), False)]
    page = Page(report_page(result(report)))
    assert "4 × 64 tokens of its own samples: not figures of a benchmark" in page.text
    assert page.tables["savings"][1][0] == "zeros, 2:4"


@given(st.floats(0, 1))
def test_text_on_the_heat_map_can_be_read(share: float) -> None:
    def light(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    background, text = cell_colors(share)
    levels = sorted(light(c if len(c) == 7 else "#" + 2 * c[1] + 2 * c[2] + 2 * c[3]) for c in (background, text))
    assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0231, "2.3"), (0.5, "50"), (4.7e-4, "0.047"), (3e-7, "3e-05"), (1e-20, "<1e-9")]
)
def test_errors_are_shown_with_two_digits(value: float, text: str) -> None:
    assert per_cent(value) == text
