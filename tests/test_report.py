"""What a report says, on a terminal and as JSON."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch

from llmcompress import measure
from llmcompress.evaluate.divergence import Divergence
from llmcompress.measure import Phases, peak_memory_bytes, versions
from llmcompress.report import BlockReport, GroupReport, MatrixReport, Report

TOP_LEVEL = {
    "model", "recipe", "seed", "versions", "seconds", "seconds_by_phase", "peak_memory_bytes", "size_bytes",
    "effective_bits", "sparsity", "perplexity", "kl_divergence", "top1_agreement", "calibration", "blocks", "warnings",
}  # fmt: skip


def example() -> Report:
    blocks = [
        BlockReport(
            f"model.layers.{i}",
            1.5,
            [
                MatrixReport(f"model.layers.{i}.mlp.up_proj", (6, 4), 0.5, 8.0, 0.01 * (i + 1)),
                MatrixReport(f"model.layers.{i}.self_attn.q_proj", (2, 4), 0.25, 4.0, 0.5),
            ],
            [GroupReport(f"model.layers.{i}.mlp.up_proj", True, "", {"clip_ratio": 0.9})],
        )
        for i in range(3)
    ]
    return Report(
        "llama",
        "jsq",
        seed=3,
        versions={"torch": "2"},
        seconds=4.0,
        seconds_by_phase={"compress": 3.0},
        peak_memory_bytes=123,
        size_bytes={"before": 200, "after": 100},
        calibration={"source": "self", "samples": 4, "length": 8, "seed": 3},
        blocks=blocks,
    )


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_every_promised_key() -> None:
    content = strict(example().to_json())
    assert content.keys() >= TOP_LEVEL
    assert content["size_bytes"].keys() == content["perplexity"].keys() == {"before", "after"}
    assert content["blocks"][0].keys() >= {"name", "seconds", "matrices"}
    assert content["blocks"][0]["matrices"][0].keys() >= {"name", "shape", "sparsity", "bits", "relative_error"}


def test_json_reads_back_as_the_same_report() -> None:
    report = example()
    report.take(Divergence(38.5, 41.9, 0.08, 0.78, 0.001, 0.002, 511))
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 1}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json(text)


def test_without_evaluation_quality_is_null() -> None:
    content = example().to_dict()
    assert content["perplexity"] == {"before": None, "after": None}
    assert content["kl_divergence"] is None and content["top1_agreement"] is None
    assert "perplexity" not in example().table()


def test_figures_that_are_not_finite_become_null_and_are_named() -> None:
    report = example()
    report.blocks[1].matrices[0].relative_error = math.nan
    report.perplexity = {"before": 3.0, "after": math.inf}
    content = strict(report.to_json())
    assert content["blocks"][1]["matrices"][0]["relative_error"] is None and content["perplexity"]["after"] is None
    assert any("blocks[1].matrices[0].relative_error" in warning for warning in content["warnings"])
    assert any("perplexity.after" in warning for warning in content["warnings"])
    assert not report.warnings
    report.table()


def test_tensors_among_the_figures_become_plain() -> None:
    report = example()
    report.blocks[0].groups[0].figures = {"alpha": torch.tensor(0.5), "scales": torch.ones(2)}
    assert strict(report.to_json())["blocks"][0]["groups"][0]["figures"] == {"alpha": 0.5, "scales": [1.0, 1.0]}


def test_bits_and_zeros_are_means_over_weights() -> None:
    report = example()
    assert report.effective_bits == pytest.approx((24 * 8 + 8 * 4) / 32)
    assert report.sparsity == pytest.approx((24 * 0.5 + 8 * 0.25) / 32)
    assert report.blocks[0].sparsity == pytest.approx(report.sparsity)
    assert sum(matrix.zeros for matrix in report.matrices) == 3 * (12 + 2)
    assert Report("m", "r").effective_bits is None


def test_the_table_has_one_line_per_kind_of_matrix_and_of_warning() -> None:
    report = example()
    report.warnings = [f"model.layers.{i}.mlp.up_proj: damping raised" for i in range(300)] + ["something else"]
    lines = report.table().splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("mlp.up_proj")] == [["mlp.up_proj", "3", "8.00"]]
    assert sum("damping raised" in line for line in lines) == 1 and any("300 times" in line for line in lines)
    assert len(lines) < 25 and max(map(len, lines)) <= 120


def test_the_table_names_the_worst_block() -> None:
    line = next(line for line in example().table().splitlines() if line.startswith("mlp.up_proj"))
    assert line.split()[-2:] == ["3.0e-02", "model.layers.2"]


def test_no_second_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    phases = Phases()
    with phases("outer"):
        now += 1
        with phases("inner"):
            now += 10
        now += 100
    now += 1000
    with contextlib.suppress(KeyError), phases("inner"):
        now += 10_000
        raise KeyError
    assert phases.seconds == {"outer": 101, "inner": 10_010} and phases.total == 11_111


def test_peak_memory_sees_what_was_allocated() -> None:
    before = peak_memory_bytes()
    held = torch.ones(300 << 18)  # 300 MiB
    after = peak_memory_bytes()
    assert held.sum() > 0
    if before is not None and after is not None:
        assert after >= 300 << 20 and after >= before


def test_versions_name_the_arithmetic() -> None:
    assert versions()["torch"] == torch.__version__
