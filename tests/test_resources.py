"""The table of presets and the data beside it."""

from __future__ import annotations

import re

import pytest

from llmcompress.errors import UserError
from llmcompress.resources import bundled_model_dir, configs_dir, model_presets


def test_every_preset_is_either_bundled_or_on_the_hub() -> None:
    for name, preset in model_presets().items():
        assert bool(preset.bundled) != bool(preset.hub), name
        assert preset.about, name


def test_hub_presets_are_hub_ids() -> None:
    ids = [preset.location for preset in model_presets().values() if preset.hub]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in ids)
    assert len(set(ids)) == len(ids)


def test_llama_needs_no_network() -> None:
    preset = model_presets()["llama"]
    assert preset.location == str(bundled_model_dir("tiny-llama"))
    assert (bundled_model_dir("tiny-llama") / "model.safetensors").stat().st_size > 10_000_000


def test_a_misspelt_bundled_checkpoint_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tiny-llama'"):
        bundled_model_dir("tiny-lama")


def test_every_recipe_opens_with_the_command_that_runs_it() -> None:
    for path in configs_dir().glob("*.yaml"):
        line = path.read_text(encoding="utf-8").splitlines()[0]
        assert line.startswith("# python -m llmcompress --model "), path.name
        assert path.stem == "models" or f"--recipe {path.stem}" in line, path.name
