"""Whatever a folder says of itself that its tensors do not bear out is found: configuration, report, record, card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inspection.damage import UP, change_json, rehash, wrong


def weights_of(config: Any) -> Any:
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


CONFIGS: list[tuple[str, Callable[[Any], object], str]] = [
    ("gptq-w4a16", lambda c: weights_of(c).update(num_bits=8), "8-bit codes of 32 × 32 take (32, 8) int32"),
    ("gptq-w4a16", lambda c: weights_of(c).update(group_size=8), "a scale per group of 8 is (32, 4), found (32, 2)"),
    ("jsq", lambda c: weights_of(c).update(num_bits=4), ""),
    ("jsq-plus-w4a8-2of4", lambda c: weights_of(c).update(num_bits=8), "has weights bits=8"),
    (
        "jsq",
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations=None),
        "inputs as they are",
    ),
    ("jsq", lambda c: c["quantization_config"].update(ignore=[]), "is missing"),
    ("jsq", lambda c: c["quantization_config"]["ignore"].append(f"re:{UP}$"), "leaves the matrix dense"),
    ("jsq", lambda c: c.pop("quantization_config"), "leaves the matrix dense"),
]


@pytest.mark.parametrize(("name", "change", "what"), CONFIGS, ids=[f"{n}-{w[:12]}" for n, _, w in CONFIGS])
def test_a_quantization_config_that_does_not_fit_the_tensors_is_found(
    copied: Callable[..., Path], name: str, change: Callable[[Any], object], what: str
) -> None:
    folder = copied(name)
    change_json(folder, "config.json", change)
    assert ("config.json", "is not the file that was written (SHA-256)") in wrong(folder)["hashes"]
    rehash(folder)
    found = wrong(folder)
    assert any(what in said for _, said in [*found.get("config", []), *found.get("grid", [])])


REPORTS: list[Callable[[Any], object]] = [
    lambda r: r.update(effective_bits=4.0),
    lambda r: r.update(sparsity=0.9),
    lambda r: r["size_bytes"].update(after=1),
    lambda r: r.update(recipe="other"),
    lambda r: r.update(seed=7),
    lambda r: r["versions"].update(torch="0"),
    lambda r: r["blocks"][1]["matrices"][0].update(sparsity=0.75),
    lambda r: r["blocks"][1]["matrices"][0].update(bits=2.0),
    lambda r: r["blocks"][1]["matrices"].pop(),
    lambda r: r.pop("blocks"),
]


@pytest.mark.parametrize("change", REPORTS, ids=range(len(REPORTS)))
def test_an_edited_report_is_found(copied: Callable[..., Path], change: Callable[[Any], object]) -> None:
    folder = copied("jsq")
    change_json(folder, "report.json", change)
    assert all("report.json" in where for where, _ in wrong(folder)["report"])


def test_a_perplexity_that_is_not_the_one_of_the_card_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq", evaluate=True)
    change_json(folder, "report.json", lambda r: r["perplexity"].update(after=1.5))
    ((where, what),) = wrong(folder)["card"]
    assert where == "README.md" and what.startswith("gives perplexity") and what.endswith("report.json 1.5")


RECORDS: list[tuple[Callable[[Any], object], str]] = [
    (lambda r: r["matrices"].pop(UP), "record"),
    (lambda r: r["matrices"].update(ghost=r["matrices"][UP]), "record"),
    (lambda r: r["matrices"][UP].update(shape=[3, 4]), "record"),
    (lambda r: r["matrices"][UP].update(zeros=1), "zeros"),
    (lambda r: r["matrices"][UP].update(bits=4), "bits"),
    (lambda r: r["matrices"][UP].clear(), "record"),
    (lambda r: r.update(matrices=3), "record"),
    (lambda r: r.update(pattern="2:4"), "masks"),
    (lambda r: r.update(pattern="0.9"), "recipe"),
    (lambda r: r.update(sha256=3), "record"),
    (lambda r: r.update(recipe={"name": "jsq", "hash": "0"}), "recipe"),
]


@pytest.mark.parametrize(("change", "check"), RECORDS, ids=range(len(RECORDS)))
def test_a_record_that_lies_is_found(copied: Callable[..., Path], change: Callable[[Any], object], check: str) -> None:
    folder = copied("jsq")
    change_json(folder, "llmcompress.json", change)
    assert check in wrong(folder)
