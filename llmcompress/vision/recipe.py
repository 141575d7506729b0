"""A recipe for a convolutional network: the stages of any recipe, and what only such networks have.

```yaml
channels: {importance: l2, ratio: 0.5, multiple: 8}   # whole channels go first; see `ChannelOptions`
scores: {score: taylor, scope: global, sparsity: 0.5}  # a mask over the whole network; see `ScoreOptions`
tune: {epochs: 3, learn: distillation}                 # training; see `TuneOptions`
batchnorm: fold                                        # fold, keep or reestimate
stages: [...]                                          # as in other recipes; may be left out
mixed: {bits: [2, 4, 8], average: 4}                   # bits by layer; see `MixedOptions`
equalise: false                                        # ranges of consecutive layers, see `equalise.py`
bias_correction: true
```"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from llmcompress.core.group import Method
from llmcompress.errors import UserError, nearest
from llmcompress.fields import converted
from llmcompress.recipe import Recipe
from llmcompress.resources import configs_dir
from llmcompress.vision.channels import ChannelOptions
from llmcompress.vision.masks import ScoreOptions
from llmcompress.vision.mixed import MixedOptions, check_mixed
from llmcompress.vision.soft import NORMS
from llmcompress.vision.tune import TuneOptions
from llmcompress.yaml12 import parse_value, read_tree

#: steps that need no more of a network than the inputs of its matrices
METHODS = ("magnitude", "wanda", "sparsegpt", "jsq", "refit", "rtn", "gptq")
_CORE_KEYS = ("stages", "targets", "description")


@dataclass(frozen=True)
class VisionRecipe:
    """What is done to a convolutional network.

    Attributes:
        name: of the file, or as given.
        core: stages, perhaps none, and targets; None where there is neither.
        channels, scores, tune, mixed: see their classes; None to leave out.
        batchnorm: ``fold`` into the convolutions, ``keep``, or keep and ``reestimate`` on the calibration images.
        equalise: the ranges of consecutive layers' weights, once norms are folded.
        bias_correction: biases take up the mean of what pruning and rounding change.
        description: one line.
        tree: the mapping it was read from, with overrides.
    """

    name: str
    core: Recipe | None
    channels: ChannelOptions | None = None
    scores: ScoreOptions | None = None
    tune: TuneOptions | None = None
    mixed: MixedOptions | None = None
    batchnorm: str = "fold"
    equalise: bool = False
    bias_correction: bool = True
    description: str = ""
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def names() -> list[str]:
        """The packaged recipes for networks of images."""
        return sorted(path.stem for path in (configs_dir() / "vision").glob("*.yaml"))

    @staticmethod
    def load(name_or_file: str | Path, overrides: Iterable[str] = ()) -> VisionRecipe:
        """Reads a packaged recipe, or a YAML file, with ``stage.key=value`` overrides.

        Raises:
            UserError: no such recipe, or something in it does not fit.
        """
        text = str(name_or_file)
        path = Path(text) if text.endswith((".yaml", ".yml")) else configs_dir() / "vision" / f"{text}.yaml"
        if not path.is_file():
            fix = "give the path of a YAML file" if path == Path(text) else nearest(text, VisionRecipe.names())
            raise UserError(f"no recipe '{text}'", "--recipe", fix)
        return VisionRecipe.from_tree(read_tree(path), path.stem, overrides)

    @staticmethod
    def from_tree(tree: object, name: str, overrides: Iterable[str] = ()) -> VisionRecipe:
        """Builds a recipe from a mapping."""
        where = f"recipe {name}"
        if not isinstance(tree, dict):
            raise UserError("a recipe is a mapping", where, "compare with configs/vision/int8.yaml")
        known = [f.name for f in dataclasses.fields(VisionRecipe) if f.name not in ("name", "core", "tree")]
        for key in tree:
            if key not in (*known, *_CORE_KEYS):
                raise UserError(f"unknown key '{key}'", where, nearest(str(key), [*known, *_CORE_KEYS]))
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
        passed = [override for override in overrides if not _taken(override, tree, known)]
        core = _core(tree, name, where, passed)
        if core is not None:
            tree |= {key: core.to_tree()[key] for key in ("stages", "targets") if core.stages or key == "targets"}
        made = {key: _section(kind, tree.get(key), key, where) for key, kind in _SECTIONS.items()}
        plain = {key: tree[key] for key in ("batchnorm", "equalise", "bias_correction") if key in tree}
        hints = {"batchnorm": Literal["fold", "keep", "reestimate"], "equalise": bool, "bias_correction": bool}
        plain = {key: converted(value, hints[key], key, where) for key, value in plain.items()}
        recipe = VisionRecipe(name, core, **made, **plain, description=str(tree.get("description", "")), tree=tree)  # type: ignore[arg-type]
        if not recipe.methods and recipe.channels is None and recipe.scores is None:
            raise UserError("does nothing", where, "add stages, channels or scores")
        if recipe.mixed is not None:
            check_mixed(recipe.methods)
        recipe.check_training()
        return recipe

    def check_training(self) -> None:
        """Refuses sections that do not fit each other.

        Raises:
            UserError: a schedule has no training, or filters grow back that nothing removes.
        """
        if self.scores is not None and self.scores.schedule != "once" and self.tune is None:
            raise UserError("grows in a training, and there is none", "scores.schedule", "add tune: {epochs: 8}")
        soft, channels = self.tune is not None and self.tune.soft, self.channels
        if soft and (channels is None or channels.importance not in NORMS or channels.budget != "channels"):
            fix = "add channels: {importance: l2}, without another budget"
            raise UserError("zeroes channels of every space by their norm", "tune.soft", fix)

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads back."""
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)

    def training(self, epochs: int) -> TuneOptions | None:
        """How to train, ``epochs`` instead of the recipe's if that is not 0; None for not at all."""
        return replace(self.tune or TuneOptions(), epochs=epochs) if epochs else self.tune

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the recipe's YAML."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:12]

    @property
    def methods(self) -> tuple[Method, ...]:
        """The steps of the stages, in order."""
        return () if self.core is None else self.core.methods

    def targets(self, name: str) -> bool:
        """Whether the matrix of this dotted name is to be compressed."""
        return self.core is None or self.core.targets(name)


_SECTIONS = {"channels": ChannelOptions, "scores": ScoreOptions, "tune": TuneOptions, "mixed": MixedOptions}


def _taken(override: str, tree: dict[str, Any], known: list[str]) -> bool:
    """Applies an override of what is not a stage's; False if it is one's."""
    path, equals, value = override.partition("=")
    head, dot, key = path.strip().partition(".")
    if not equals or head not in known:
        return False
    if head in _SECTIONS:
        if not dot:
            raise UserError(f"'{override}' names no key of {head}", "--set", f"write {head}.key=value")
        tree[head] = {**(tree.get(head) or {}), key: parse_value(value)}
    else:
        tree[head] = parse_value(value)
    return True


def _section(kind: type, options: object, key: str, where: str) -> object:
    """The class of a section, its fields filled."""
    if options is None:
        return None
    where = f"{where}: {key}"
    if not isinstance(options, dict):
        raise UserError(f"takes a mapping, not {options!r}", where)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in options:
        if name not in fields:
            raise UserError(f"unknown key '{name}'", where, nearest(str(name), fields))
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in options:
            raise UserError(f"needs '{name}'", where, f"add {name}: …")
    hints = typing.get_type_hints(kind)
    return kind(**{name: converted(value, hints[name], name, where) for name, value in options.items()})


def _core(tree: dict[str, Any], name: str, where: str, overrides: list[str]) -> Recipe | None:
    """The stages as a recipe of their own; refuses what convolutions cannot have."""
    if not tree.get("stages"):
        for override in overrides:
            if not override.startswith("targets."):
                raise UserError(f"'{override}' is of a stage, and there are none", "--set", "see the recipe's keys")
        if not overrides and not tree.get("targets"):
            return None
        alone = {"stages": [{"prune": {"method": "magnitude", "sparsity": 0.0}}], "targets": tree.get("targets")}
        return dataclasses.replace(Recipe.from_tree(alone, name, overrides), stages=())
    core = Recipe.from_tree({key: tree[key] for key in _CORE_KEYS if key in tree}, name, overrides)
    for stage in core.stages:
        if stage.method_name not in METHODS:
            raise UserError(
                f"method {stage.method_name} is for language models", where, nearest(stage.method_name, METHODS)
            )
        if getattr(stage.method, "uneven", False):
            raise UserError("there are no blocks whose ratios could differ", f"{where}: {stage.kind}",
                            "leave ramp and ratios out")  # fmt: skip
        grid = getattr(stage.method, "activations", None)
        if grid is not None and grid.group != "tensor":
            raise UserError(
                "a convolution's inputs have no tokens", f"{where}: activations", "use int8-static-asym or int8-tensor"
            )
    return core
