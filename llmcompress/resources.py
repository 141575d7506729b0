"""Data that travels with the program: recipes, the table of model presets, and the bundled checkpoint.

One rule: data lies inside the package. The exceptions are ``configs/`` and ``eval/``, which a source checkout keeps at
its top level, where people edit them; building a wheel copies these folders into ``llmcompress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from llmcompress.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of the packaged ``*.yaml`` recipes and of ``models.yaml``."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def eval_dir() -> Path:
    """The folder of the packaged task files for lm-eval."""
    installed = PACKAGE / "eval"
    return installed if installed.is_dir() else PACKAGE.parent / "eval"


def bundled_model_dir(name: str) -> Path:
    """The folder of a checkpoint that travels with the package, e.g. ``tiny-llama``.

    Raises:
        UserError: no checkpoint of that name is bundled.
    """
    data = PACKAGE / "data"
    folder = data / name
    if not (folder / "config.json").is_file():
        known = [config.parent.name for config in data.glob("*/config.json")]
        raise UserError(f"no bundled checkpoint '{name}'", str(data), nearest(name, known))
    return folder


@dataclass(frozen=True)
class ModelPreset:
    """One row of ``configs/models.yaml``. Exactly one of ``bundled`` and ``hub`` is given.

    Attributes:
        about: what it is, in a few words.
        bundled: name of a checkpoint inside the package.
        hub: id of a model on the Hugging Face Hub.
    """

    about: str
    bundled: str = ""
    hub: str = ""

    @property
    def location(self) -> str:
        """What to load: a local folder for a bundled checkpoint, a Hub id otherwise."""
        return str(bundled_model_dir(self.bundled)) if self.bundled else self.hub


def model_presets() -> dict[str, ModelPreset]:
    """The table of ``configs/models.yaml``: name of ``--model`` → preset."""
    table = yaml.safe_load((configs_dir() / "models.yaml").read_text(encoding="utf-8"))
    return {name: ModelPreset(**row) for name, row in table.items()}
