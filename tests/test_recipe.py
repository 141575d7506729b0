"""Recipes are checked in full, with one plain line, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.recipe import Recipe
from llmcompress.resources import configs_dir
from llmcompress.yaml12 import parse_value

REQUIRED = [
    "rtn-w8a8", "magnitude-50", "wanda-50", "wanda-2of4", "wanda-4of8", "smoothquant-w8a8", "wanda-smoothquant",
    "jsq", "jsq-2of4", "jsq-4of8",
]  # fmt: skip


@pytest.mark.parametrize("name", Recipe.names())
def test_every_packaged_recipe_loads_and_survives_saving(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    saved = tmp_path / f"{name}.yaml"
    saved.write_text(recipe.to_yaml())
    again = Recipe.load(saved)
    assert again == recipe and again.hash == recipe.hash
    first = (configs_dir() / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# python -m llmcompress --model ") and f"--recipe {name}" in first


def test_required_recipes_are_packaged() -> None:
    assert set(REQUIRED) <= set(Recipe.names())


def test_override_changes_one_value() -> None:
    recipe = Recipe.load("jsq", ["prune.sparsity=2:4", "quantize.weights=int4-g32", "targets.exclude=['*.down_proj']"])
    assert recipe.sparsity == Sparsity.parse("2:4")
    assert recipe.grid == QuantGrid(bits=4, group=32)
    assert not recipe.targets("model.layers.0.mlp.down_proj") and recipe.targets("model.layers.0.mlp.up_proj")
    assert recipe.hash != Recipe.load("jsq").hash


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("4e-5", 4e-5),
        ("0.5", 0.5),
        ("8", 8),
        ("[0, 4e-5]", [0, 4e-5]),
        ("true", True),
        ("int8", "int8"),
    ],
)
def test_values_are_read_as_written(text: str, value: object) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


WANDA, INT8 = {"prune": {"sparsity": 0.5}}, {"quantize": {"weights": "int8"}}


def stages(*entries: object) -> dict[str, object]:
    return {"stages": list(entries)}


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (stages({"prun": {}}), "did you mean 'prune'"),
        (stages({"prune": {"method": "wada", "sparsity": 0.5}}), "did you mean 'wanda'"),
        (stages({"prune": {"method": "rtn"}}), "no method 'rtn' for stage prune"),
        (stages({"prune": {"sparsty": 0.5}}), "did you mean 'sparsity'"),
        (stages({"prune": {"method": "wanda"}}), "needs 'sparsity'"),
        (stages({"prune": {"sparsity": 1.0}}), "outside [0, 1)"),
        (stages({"prune": {"sparsity": -0.1}}), "outside [0, 1)"),
        (stages({"prune": {"sparsity": "5:4"}}), "0 < N < M"),
        (stages({"prune": {"sparsity": "half"}}), "no sparsity"),
        (stages({"quantize": {"weights": "int9"}}), "9 bits"),
        (stages({"quantize": {"weights": "int4-g0"}}), "group size 0"),
        (stages({"quantize": {"weights": {"bits": 4, "grup": 8}}}), "did you mean 'group'"),
        (stages({"quantize": {"weights": "int8", "activations": "int8-g32-static"}}), "static scales"),
        (stages({"smooth": {"alpha": "much"}}), "not a number or auto"),
        (stages({"smooth": {"alpha": -0.1}}), "alpha -0.1"),
        (stages({"smooth": {"alpha": float("nan")}}), "nan is not a finite number"),
        (stages({"smooth": {"method": "awq", "points": 0}}), "0 points"),
        (stages({"prune": {"method": "sparsegpt", "sparsity": 0.5, "damping": 0.0}}), "damping 0"),
        (stages({"prune": {"method": "sparsegpt", "sparsity": 0.5, "damping": float("inf")}}), "not a finite number"),
        (stages({"prune": {"method": "sparsegpt", "sparsity": 0.5, "refit": True, "grow": -1}}), "-1 rounds"),
        (stages({"prune": {"method": "refit", "damping": -0.1}}), "damping -0.1"),
        (stages({"quantize": {"method": "gptq", "weights": "int4", "damping": 0.0}}), "damping 0"),
        (stages({"quantize": {"method": "obr", "weights": "int4", "damping": 0.0}}), "damping 0"),
        (stages(INT8, WANDA), "prune: nothing follows a quantize stage"),
        (stages(INT8, {"smooth": {}}), "smooth: nothing follows a quantize stage"),
        (stages(INT8, {"quantize": {"method": "gptq", "weights": "int4"}}), "nothing follows a quantize stage"),
        (stages(WANDA, {"prune": {"method": "sparsegpt", "sparsity": 0.6}}), "sparsegpt decides on all zeros itself"),
        (
            stages({"smooth": {}}, {"quantize": {"method": "omniquant", "weights": "int8"}}),
            "learns the smoothing itself",
        ),
        (stages({"clip": {"candidates": 0.1}}), "0.1 is not a list, each a number"),
        (stages(), "no stages"),
        ({"stages": [], "stags": 1}, "did you mean 'stages'"),
        ([], "mapping"),
        ({"stages": [{"prune": {"sparsity": 0.5}}], "targets": {"only": "x"}}, "unknown key 'only'"),
    ],
)
def test_mistakes_are_named_in_one_line(tree: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.from_tree(tree, "mine")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["prune.sparsity", "sparsity=0.5", "quantise.weights=int8", "prune.sparsity=[", "prune.x=1"]
)
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(UserError):
        Recipe.load("wanda-50", [override])


def test_another_method_takes_the_options_it_knows_and_no_others() -> None:
    wanda = Recipe.load("jsq", ["prune.method=wanda"]).stages[1]
    assert (wanda.method_name, wanda.options) == ("wanda", {"sparsity": 0.5})
    for order in (1, -1):
        with pytest.raises(UserError, match="unknown key 'rho'"):  # asked for, not taken over
            Recipe.load("jsq", ["prune.method=wanda", "prune.rho=2"][::order])


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'wanda-50'"):
        Recipe.load("wanda50")
    with pytest.raises(UserError, match="no recipe"):
        Recipe.load("/nowhere/mine.yaml")
