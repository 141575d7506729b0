"""Which tensor on disk is which parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmcompress.model import names
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from tests.architectures import CONFIGS, tiny_folder


def matched(checkpoint: Checkpoint) -> dict[str, list[str]]:
    return BlockwiseModel(checkpoint, torch.float32).source_names


@pytest.mark.parametrize("model_type", CONFIGS)
def test_where_names_are_the_parameters_own_the_table_would_have_changed_none(model_type: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_folder(tmp_path / "dense", model_type))
    plainly = matched(checkpoint)
    first = next(iter(checkpoint.tensors.values()))
    checkpoint.tensors["no.such.parameter"] = replace(first)  # so that the table is read
    assert matched(checkpoint) == plainly


def test_the_table_is_read_where_a_name_is_no_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = Checkpoint(tiny_folder(tmp_path / "dense", "llama")), []

    def read(model: object) -> list[object]:
        asked.append(model)
        return []

    monkeypatch.setattr(names, "get_model_conversion_mapping", read)
    found = matched(checkpoint)
    assert not asked
    checkpoint.tensors = {name.removeprefix("model."): info for name, info in checkpoint.tensors.items()}
    assert matched(checkpoint) == {p: [s.removeprefix("model.") for s in sources] for p, sources in found.items()}
    assert asked
