"""A run leaves its page beside its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.api import Options, compress
from llmcompress.calibration import digest
from llmcompress.cli import main
from llmcompress.report import Report
from tests.pages.reports import Page


@pytest.fixture(scope="module")
def made(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("runs") / "made"
    options = Options(calibration=str(text), eval_text=str(text), samples=4, length=16, device="cpu")
    return folder, compress(checkpoint, "jsq", folder, options, command="python -m llmcompress <&> --model tiny")


def test_the_page_has_the_figures_of_the_report_beside_it(made: tuple[Path, Report]) -> None:
    folder, report = made
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tables["headline"][1:] == Report.from_json((folder / "report.json").read_text("utf-8")).headline()
    assert page.parts["command"] == "python -m llmcompress <&> --model tiny"
    assert page.parts["recipe"] == (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert sum(float(row[-1].removesuffix(" s")) for row in page.tables["phases"]) == pytest.approx(
        report.seconds, abs=0.2
    )
    assert "page" in report.seconds_by_phase


def test_the_report_command_writes_the_same_page(made: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = made
    assert main(["report", str(folder), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


def test_every_group_tells_how_large_its_inputs_are(made: tuple[Path, Report]) -> None:
    _, report = made
    for block in report.blocks:
        assert block.peak_memory_bytes
        for group in block.groups:
            assert group.inputs["channels"] in {m.shape[1] for m in block.matrices}
            assert ("after" in group.inputs) is bool(group.folded)
            assert group.inputs["outlier_ratio"]["before"] >= 1


def test_rows_judged_on_have_a_digest_that_other_rows_have_not(made: tuple[Path, Report]) -> None:
    _, report = made
    rows = torch.arange(32).view(2, 16)
    assert len(report.evaluation["sha256"]) == 64
    assert digest(rows) == digest(rows.clone()) != digest(rows + 1)
