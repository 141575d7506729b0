"""Folders that recipes made, to be inspected or damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress import compress
from llmcompress.api import Options
from tests.inspection.damage import FAMILIES, FURTHER


@pytest.fixture(scope="session")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that a recipe makes of the tiny checkpoint; made once."""
    folders = tmp_path_factory.mktemp("compressed")

    def made(name: str, model: Path = checkpoint, evaluate: bool = False) -> Path:
        recipe, overrides = FURTHER.get(name) or (name, FAMILIES[name])
        folder = folders / f"{model.name}-{name.replace(' ', '-')}-{evaluate}"
        if not folder.exists():
            compress(model, recipe, folder, Options(samples=4, length=16, evaluate=evaluate), overrides=overrides)
        return folder

    return made


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a folder, to be damaged."""
    return lambda name, **how: Path(shutil.copytree(made(name, **how), tmp_path / "copy"))
