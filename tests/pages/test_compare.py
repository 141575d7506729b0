"""Comparing results: the frontier, who can be compared with whom, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.cli import main
from llmcompress.pages.compare_page import as_dict, compare_page, table
from llmcompress.pages.frontier import comparable, differences, frontier, ranked
from llmcompress.pages.results import Result, Speed, read_result, read_results
from llmcompress.report import Report
from tests.pages.reports import HOSTILE, Page, example, write


def varied(kl: float, size: int, recipe: str = "jsq") -> Report:
    report = example()
    report.recipe, report.kl_divergence, report.size_bytes["after"] = recipe, kl, size << 20
    return report


points = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 2), max_size=12)


@given(points)
def test_the_frontier_is_what_nothing_beats(found: list[tuple[float, float]]) -> None:
    for (x, y), on in zip(found, frontier(found), strict=True):
        beaten = any((a <= x and b < y) or (a < x and b <= y) for a, b in found)
        assert on is not beaten


@given(points)
def test_on_the_frontier_a_larger_size_means_a_smaller_loss(found: list[tuple[float, float]]) -> None:
    best = sorted({p for p, on in zip(found, frontier(found), strict=True) if on})
    assert [y for _, y in best] == sorted({y for _, y in best}, reverse=True)


def test_results_are_ranked_by_divergence_and_marked_on_every_axis() -> None:
    reports = [varied(0.3, 4), varied(0.1, 6), varied(0.2, 7), varied(0.4, 3)]
    speeds = [{"decode": Speed(10.0)}, {"decode": Speed(30.0)}, {}, {}]
    found = [
        Result(str(i), r, speeds=s, machine="m" * bool(s)) for i, (r, s) in enumerate(zip(reports, speeds, strict=True))
    ]
    (group,) = ranked(found)
    assert [r.name for r in group.results] == ["1", "2", "0", "3"]
    assert group.best["size"] == [True, False, True, True]
    assert group.best["decode"] == [True, False, False, False]
    assert [axis.key for axis in group.axes] == ["size", "nonzero", "decode"]


def test_speeds_of_two_machines_make_no_axis() -> None:
    found = [Result(m, example(), speeds={"decode": Speed(9.0)}, machine=m) for m in ("one", "other")]
    assert [axis.key for axis in ranked(found)[0].axes] == ["size", "nonzero"]


def other_text(report: Report) -> None:
    report.evaluation["sha256"] = "cd" * 32


def other_model(report: Report) -> None:
    report.size_bytes["before"] = 1


def other_weights(report: Report) -> None:
    report.perplexity["before"] *= 1.01


def unjudged(report: Report) -> None:
    report.evaluation, report.kl_divergence, report.perplexity = {}, None, {"before": None, "after": None}


@pytest.mark.parametrize("change", [other_text, other_model, other_weights, unjudged])
def test_what_was_judged_otherwise_is_ranked_apart(change) -> None:
    a, b, c = example(), example(), example()
    change(b)
    assert comparable(a, c) and not comparable(a, b) and not comparable(b, a)
    groups = ranked([Result("a", a), Result("b", b), Result("c", c)])
    assert [[r.name for r in group.results] for group in groups] == [["a", "c"], ["b"]]
    content = as_dict(groups)
    assert content["comparable"] is False and content["groups"][1]["apart"] == differences(a, b) != []
    page = Page(compare_page(groups))
    assert "cannot be compared" in page.text and differences(a, b)[0] in page.text


def test_the_same_text_is_known_without_a_hash_by_its_source_and_seed() -> None:
    a, b = example(), example()
    for report in (a, b):
        del report.evaluation["sha256"]
    assert comparable(a, b)
    b.evaluation["seed"] += 1
    assert differences(a, b) == ["judged on other tokens"]


def test_a_dense_perplexity_may_differ_by_arithmetic() -> None:
    a, b = example(), example()
    b.perplexity["before"] *= 1.0005
    assert comparable(a, b)


def test_the_page_holds_the_table_and_a_picture_per_axis() -> None:
    groups = ranked([Result("one", varied(0.3, 4)), Result(HOSTILE, varied(0.1, 6))])
    page = Page(compare_page(groups))
    assert page.tables["results"] == table(groups[0]) and page.tags.count("svg") == 2
    assert "script" not in page.tags and "img" not in page.tags
    assert compare_page(groups) == compare_page(groups)


def test_the_command_prints_a_table_and_writes_a_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [str(write(tmp_path / n, varied(kl, s))) for n, kl, s in (("small", 0.3, 4), ("large", 0.1, 6))]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert out.index("large") < out.index("small") and "written to comparison.html" in out
    assert Page(Path("comparison.html").read_text(encoding="utf-8")).tables["results"][1][1] == "large (jsq)"
    assert main(["compare", *folders]) == 0  # its own page is replaced
    capsys.readouterr()
    Path("comparison.html").unlink()
    assert main(["compare", *folders, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in content["groups"][0]["results"]] == ["large", "small"]
    assert not Path("comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "RUN"), (["compare", "nowhere"], "nowhere"), (["compare", "empty"], "report.json"),
        (["compare", "bad"], "not a report"), (["compare", "good", "./good"], "twice"),
        (["compare", "good", "--output", "foreign.html"], "foreign.html"),
        (["compare", "good", "--output", "empty"], "folder"),
        (["compare", "good", "--output", "no/such/file.html"], "cannot be written"),
        (["compare", "benched"], "bench.json"), (["report", "empty"], "report.json"),
        (["report", "judged"], "evaluation.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.html").write_text("<p>mine</p>")
    write(tmp_path / "good", example())
    (write(tmp_path / "benched", example()) / "bench.json").write_text(
        '{"tokens_per_second": {"decode": {"after": -1}}}'
    )
    (write(tmp_path / "judged", example()) / "evaluation.json").write_text('{"texts": [{}], "tasks": []}')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text("{}")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert (tmp_path / "foreign.html").read_text() == "<p>mine</p>"


def test_a_folder_is_read_with_its_speeds(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", example())
    (folder / "bench.json").write_text('{"machine": "m", "tokens_per_second": {"decode": {"before": 2, "after": 3.5}}}')
    found = read_result(folder)
    assert found.report == example() and found.speeds == {"decode": Speed(3.5, 2)} and found.machine == "m"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [str(write(tmp_path / place / "run", example())) for place in ("a", "b")]
    assert [r.name for r in read_results(folders)] == folders
    assert replace(read_results(folders[:1])[0]).name == "run"
