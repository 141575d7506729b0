"""A later evaluation that is kept in the folder joins the page and the comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmcompress.evaluate.accuracy import TaskBeside, TaskQuality
from llmcompress.evaluate.quality import Beside, Estimate, Perplexity, TextQuality
from llmcompress.evaluate.result import Evaluation, JudgedModel
from llmcompress.pages.compare_page import judged_table, text
from llmcompress.pages.evaluations import judgements
from llmcompress.pages.frontier import ranked
from llmcompress.pages.report_page import report_page
from llmcompress.pages.results import Result, read_result, read_results
from tests.pages.reports import Page, example, write


def evaluation(perplexity: float, sha256: str = "ab") -> Evaluation:
    dense = Perplexity(Estimate(20.0), None, Estimate(2.0), 1.0)
    ours = Perplexity(Estimate(perplexity, perplexity - 1, perplexity + 1), None, Estimate(2.5), 1.3)
    share = Estimate(0.75, 0.5, 1.0)
    beside = Beside(dense, Estimate(1.1), 0.0125, "worse", Estimate(0.0625, 0.05, 0.07), share, share)
    words = TextQuality("/some/books.txt", sha256, 100, 1, 5, 80, 500, "rolling", "window", ours, beside, [], [])
    against = TaskBeside(0.8, -0.05, 0.5, 1.0, "mcnemar", 1, 2, "within noise")
    task = TaskQuality("pairs", "acc", 40, "task", "", share, True, 0, "1.0", against)
    model = JudgedModel("m", "simulated", "cpu", "float32", 1, {})
    return Evaluation(model, model, {"limit": None}, "rolling", None, [words], [task, replace(task, level="member")])


def kept(folder: Path, found: Evaluation) -> Path:
    write(folder, example())
    (folder / "evaluation.json").write_text(found.to_json(), encoding="utf-8")
    return folder


def test_the_page_shows_every_figure_with_its_interval_and_verdict(tmp_path: Path) -> None:
    page = Page(report_page(read_result(kept(tmp_path / "a", evaluation(22.0)))))
    assert page.tables["judged"][1:] == [
        ["books.txt: perplexity per token", "22.000", "21.000 – 23.000", "20.000", "0.013", "worse"],
        ["books.txt: perplexity per byte", "2.500", "", "2.000", "0.013", "worse"],
        ["books.txt: KL, nats per token", "0.06250", "0.05000 – 0.07000", "", "", ""],
        ["books.txt: top-1 agreement", "75.0%", "50.0% – 100.0%", "", "", ""],
        ["books.txt: top-5 agreement", "75.0%", "50.0% – 100.0%", "", "", ""],
        ["pairs: acc, 40 items", "75.0%", "50.0% – 100.0%", "80.0%", "1", "within noise"],
    ]


def test_figures_of_the_same_text_stand_side_by_side_and_others_do_not(tmp_path: Path) -> None:
    runs = {"a": evaluation(22.0), "b": evaluation(23.0), "c": evaluation(24.0, sha256="cd")}
    folders = [str(kept(tmp_path / name, found)) for name, found in runs.items()]
    (group,) = ranked(read_results(folders))
    rows = {row[0]: row[1:] for row in judged_table(group)}
    assert rows["books.txt: perplexity per token"] == ["22.000", "23.000", "-"]
    assert rows["pairs: acc, 40 items"] == ["75.0%"] * 3
    assert "books.txt: perplexity per token" in text([group])


def test_without_evaluations_there_is_no_table() -> None:
    assert judged_table(ranked([Result("a", example())] * 2)[0]) == []


@pytest.mark.parametrize("broken", [{}, {"texts": []}, {"texts": [1], "tasks": [], "data": {}, "options": {}}])
def test_what_is_no_evaluation_is_refused(broken: dict) -> None:
    with pytest.raises(ValueError, match="not an evaluation"):
        judgements(broken)


def test_a_figure_that_is_lost_is_refused(tmp_path: Path) -> None:
    content = json.loads(evaluation(22.0).to_json())
    content["tasks"][0]["value"]["value"] = None
    with pytest.raises(ValueError, match="no number"):
        judgements(content)
