"""The worked example of CONTRIBUTING.md is a method that works as it is printed."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from llmcompress.core.group import Matrix, MatrixGroup, Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats

PAGE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def printed(language: str) -> str:
    """The one block of this language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return block


@pytest.fixture
def ria(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    module = types.ModuleType("ria")
    monkeypatch.setitem(sys.modules, "ria", module)  # where dataclasses look up annotations
    exec(compile(printed("python"), "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.__dict__["RIA"]


def test_the_printed_method_keeps_what_its_formula_says(ria: type[Method]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    x = torch.randn(40, 8, generator=generator) * torch.arange(1, 9)
    stats = InputStats(8, ria.needs)
    stats.update(x)
    group = MatrixGroup([Matrix("layer", weight.clone())])
    ria(Sparsity.parse(0.5), 0.5).apply(group, stats)  # type: ignore[call-arg]
    w = weight.double().abs().tolist()
    norms = x.double().square().sum(0).sqrt().tolist()
    for i in range(6):
        scores = [(w[i][j] / sum(w[i]) + w[i][j] / sum(row[j] for row in w)) * norms[j] ** 0.5 for j in range(8)]
        best = set(sorted(range(8), key=scores.__getitem__)[4:])
        assert set(group.matrices[0].weight[i].nonzero().flatten().tolist()) == best


def test_the_printed_recipe_gives_the_methods_own_keys(ria: type[Method]) -> None:
    (stage,) = yaml.safe_load(printed("yaml"))["stages"]
    assert set(stage["prune"]) - {"method"} == set(ria.__dataclass_fields__)  # type: ignore[attr-defined]
