"""Each format has one row that says where its saving is real, and the report and the card carry it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.export.card import model_card
from llmcompress.export.quantized import Scheme
from llmcompress.report import Report
from llmcompress.runtime.choose import choose
from llmcompress.savings import savings

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
SCHEMES = {
    "w8a8": Scheme(W("int8"), A("int8")),
    "w8a8-asym": Scheme(W("int8-asym"), A("int8")),
    "w6a6": Scheme(W("int6"), A("int6")),
    "w4a16": Scheme(W("int4-g128")),
    "w3a16": Scheme(W("int3-g64")),
    "w4a8": Scheme(W("int4-g128"), A("int8")),
    "fp8": Scheme(W("fp8"), A("fp8")),
    "fp8-weights": Scheme(W("fp8")),
    "nvfp4": Scheme(W("nvfp4")),
    "mxfp4": Scheme(W("mxfp4")),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_speed_on_a_cpu_is_claimed_where_there_is_a_kernel(name: str) -> None:
    (row,) = savings([SCHEMES[name]] * 3, None, False)
    assert all(row.cells)
    assert ("llmcompress.load" in row.cpu) == (choose(SCHEMES[name], 256, 256, "auto")[0] != "dense")


def test_zeros_save_nothing_by_themselves() -> None:
    for pattern in ("0.5", "2:4", "4:8"):
        (row,) = savings([], Sparsity.parse(pattern), False)
        assert row.memory == row.cpu == "no" and "pack" in row.disk
        assert ("Ampere" in row.gpu) == (pattern == "2:4")


def test_every_saving_has_its_row() -> None:
    rows = savings([SCHEMES["w8a8"], SCHEMES["w4a16"], SCHEMES["w8a8"]], Sparsity.parse("2:4"), True)
    assert [row.what for row in rows] == [
        "heads and channels removed", "zeros, 2:4", "integer weights and inputs", "4-bit weights",
    ]  # fmt: skip


def test_report_and_card_carry_the_rows() -> None:
    report = Report("m", "r", savings=[asdict(row) for row in savings([SCHEMES["w8a8"]], None, False)])
    assert Report.from_json(report.to_json()).savings == report.savings
    assert "Turing to Hopper" in report.table()
    assert "| integer weights and inputs | yes |" in model_card(report, "", "m")
