"""Advice follows from the figures at the bounds it states, and its commands are ones that the program takes."""

from __future__ import annotations

import shlex
from statistics import median

import pytest

from llmcompress.pages.advice import FEW_TOKENS, LITTLE, OUTLIERS, STANDS_OUT, STRONGER, UNSURE, advice, outstanding
from llmcompress.recipe import Recipe
from llmcompress.report import Report
from tests.pages.reports import example


def commands(report: Report) -> list[str]:
    return [item.command for item in advice(report)]


def test_a_stronger_recipe_has_the_same_budget() -> None:
    for weak, strong in STRONGER.items():
        a, b = Recipe.load(weak), Recipe.load(strong)
        assert str(a.sparsity) == str(b.sparsity), (weak, strong)
        assert (a.grid and a.grid.bits) == (b.grid and b.grid.bits), (weak, strong)


def test_stronger_recipes_lead_to_an_end() -> None:
    for name in STRONGER:
        seen = [name]
        while seen[-1] in STRONGER:
            seen.append(STRONGER[seen[-1]])
            assert len(seen) == len(set(seen)), seen


def test_a_stronger_recipe_is_for_results_that_lost_something() -> None:
    report = example()
    report.kl_divergence = LITTLE
    assert "--recipe jsq-plus" in commands(report)
    report.kl_divergence = 0.99 * LITTLE
    assert "--recipe jsq-plus" not in commands(report) and "--recipe gptq-best-w4a16" in commands(report)


def test_what_stands_out_is_found_and_can_be_left_out() -> None:
    report = example()
    report.blocks[1].matrices[2].relative_error = 5.0
    errors = {m.name: m.relative_error or 0.0 for m in report.matrices}
    far = {name: e for name, e in errors.items() if e >= STANDS_OUT * median(errors.values())}
    found = outstanding(report)
    assert [m.name for m, _ in found] == sorted(far, key=lambda name: -far[name])[:3]
    assert found[0][0].name == "model.layers.1.mlp.up_proj"
    option, override = shlex.split(next(c for c in commands(report) if "targets.exclude" in c))
    assert option == "--set" and not Recipe.load("jsq", [override]).targets("model.layers.1.mlp.up_proj")


def test_unsmoothed_outliers_are_named_at_the_bound() -> None:
    report = example()
    report.recipe, groups = "gptq-w8a8", [g for b in report.blocks for g in b.groups]
    for group in groups:
        group.folded, group.inputs = None, {"outlier_ratio": {"before": OUTLIERS - 0.1}}
    assert "--recipe smoothquant-w8a8" not in commands(report)
    groups[0].inputs["outlier_ratio"]["before"] = OUTLIERS
    assert "--recipe smoothquant-w8a8" in commands(report)


@pytest.mark.parametrize(
    ("rows", "expected"), [(FEW_TOKENS // 64 - 1, "--samples 512"), (FEW_TOKENS // 64, "--calibration FILE.txt")]
)
def test_more_text_is_asked_for_where_there_was_little(rows: int, expected: str) -> None:
    report = example()
    report.calibration["samples"] = rows
    assert expected in commands(report)


def test_recovery_is_for_structured_results_without_any() -> None:
    report = example()
    assert "--recover-steps 200" not in commands(report)
    report.recovery = {}
    assert "--recover-steps 200" in commands(report)
    report.structure = {}
    assert "--recover-steps 200" not in commands(report)


def test_an_uncertain_divergence_asks_for_more_text() -> None:
    report = example()
    report.kl_divergence, report.kl_stderr = 0.1, 0.1 * UNSURE
    assert "--eval-text FILE.txt" not in commands(report)
    report.kl_stderr = 0.1 * UNSURE * 1.01
    assert "--eval-text FILE.txt" in commands(report)


def test_what_was_not_judged_is_to_be_judged() -> None:
    assert [item.what for item in advice(Report("m", "r"))] == ["Judge the result."]
