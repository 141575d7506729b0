"""Every architecture goes through, and the written table says what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from scripts.architectures import RECIPES, REFUSED, RESULTS, TOLERANCE, WRONG, examine, markdown, smoothing_error, table
from tests.architectures import ALL

TABLE = table()
#: what may stay dense although it has two axes: no matrix of the block, or one that decides or gates
LEFT = ("gate", "router", "router.layer", "A_log", "conv1d", "conv.conv", "dt_proj")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """transformers says on every load what it misses."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def test_the_written_table_has_every_architecture_once() -> None:
    assert list(TABLE) == list(ALL)
    written = (RESULTS / "architectures.md").read_text(encoding="utf-8")
    assert written == markdown(TABLE)


def test_the_table_refuses_few_and_gets_none_wrong() -> None:
    verdicts = [row[recipe]["verdict"] for row in TABLE.values() for recipe in RECIPES]
    assert WRONG not in verdicts
    passed = [n for n, row in TABLE.items() if all(row[recipe]["verdict"] != REFUSED for recipe in RECIPES)]
    assert len(passed) >= 70
    for row in TABLE.values():
        for recipe in RECIPES:
            assert row[recipe]["verdict"] == REFUSED or row[recipe]["share"] >= 0.99 or row[recipe]["left"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", ALL)
def test_what_is_written_reads_back_as_the_table_says(model_type: str, recipe: str, tmp_path: Path) -> None:
    outcome, expected = examine(model_type, recipe, tmp_path), TABLE[model_type][recipe]
    assert (outcome.verdict, outcome.left) == (expected["verdict"], expected["left"])
    assert outcome.error <= TOLERANCE
    assert outcome.share == pytest.approx(expected["share"])


@pytest.mark.parametrize("model_type", [name for name, row in TABLE.items() if "error" in row["smooth"]])
def test_smoothing_leaves_the_logits_as_they_were(model_type: str, tmp_path: Path) -> None:
    error, folded, _ = smoothing_error(model_type, tmp_path)
    assert error < 2e-4
    assert folded == TABLE[model_type]["smooth"]["folded"]
