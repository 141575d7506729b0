"""A recipe is an ordered list of stages: clip, prune, smooth, quantize, each done by a method.

Recipes are read from YAML (``configs/*.yaml`` hold the named ones), checked in full before anything is loaded, and
saved with the result; their hash names the run."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Method
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.structure import StructuredMethod
from llmcompress.errors import UserError, nearest
from llmcompress.fields import converted
from llmcompress.methods import DEFAULT_METHOD, METHODS
from llmcompress.resources import configs_dir
from llmcompress.yaml12 import parse_value, read_tree

_TOP_KEYS = ("description", "stages", "targets", "propagate", "kv_cache")
_PROPAGATE = ("compressed", "pruned", "block", "dense")
_IN_STEP = ("compressed", "pruned")  # modes in which tokens pass each matrix once, behind its predecessors
_NO_RECIPES = {"models"}  # other tables that live beside the recipes


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        kind: ``clip``, ``prune``, ``smooth`` or ``quantize``.
        method_name: key in METHODS.
        method: the step itself, its fields filled from the recipe.
        options: the keys as the user wrote them, for saving.
    """

    kind: str
    method_name: str
    method: Method
    options: dict[str, object]


@dataclass(frozen=True)
class Recipe:
    """What is done to a model.

    Attributes:
        name: of the file, or as given.
        stages: in order.
        include, exclude: shell patterns over matrix names (``*.down_proj``); a matrix is compressed if one of
            ``include`` and none of ``exclude`` matches.
        propagate: what the tokens go on through once a matrix is done: its ``compressed`` form, so that everything is
            calibrated on what its predecessors produce; its ``pruned`` and smoothed form, not rounded yet; the dense
            ``block``, and then the compressed one, as the papers' code does; or the ``dense`` model.
        description: one line.
        kv_cache: ``fp8`` to store the scales with which a server keeps keys and values in FP8; empty for none.
    """

    name: str
    stages: tuple[Stage, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    propagate: str = "compressed"
    description: str = ""
    kv_cache: str = ""

    @staticmethod
    def names() -> list[str]:
        """The packaged recipes."""
        return sorted(p.stem for p in configs_dir().glob("*.yaml") if p.stem not in _NO_RECIPES)

    @staticmethod
    def load(name_or_file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Reads a packaged recipe by name, or a YAML file, with ``stage.key=value`` overrides.

        Raises:
            UserError: no such recipe, stage, method, key, or a value that does not fit.
        """
        text = str(name_or_file)
        path = Path(text) if text.endswith((".yaml", ".yml")) else configs_dir() / f"{text}.yaml"
        if not path.is_file() or path.stem in _NO_RECIPES:
            fix = "give the path of a YAML file" if path == Path(text) else nearest(text, Recipe.names())
            raise UserError(f"no recipe '{text}'", "--recipe", fix)
        return Recipe.from_tree(read_tree(path), path.stem, overrides)

    @staticmethod
    def from_tree(tree: object, name: str, overrides: Iterable[str] = ()) -> Recipe:
        """Builds a recipe from the mapping a YAML file holds."""
        where = f"recipe {name}"
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list):
            raise UserError("a recipe is a mapping with a list 'stages'", where, "compare with configs/jsq.yaml")
        _known(tree, _TOP_KEYS, where)
        targets = tree.get("targets") or {}
        if not isinstance(targets, dict):
            raise UserError("targets is a mapping of include and exclude", where)
        _known(targets, ("include", "exclude"), f"{where}: targets")
        stages = [_read_stage(entry, where) for entry in tree["stages"]]
        targets = dict(targets)
        run = {"propagate": tree.get("propagate", "compressed"), "kv_cache": tree.get("kv_cache", "")}
        for override in sorted(overrides, key=lambda text: ".method=" not in text):  # methods first
            _override(override, stages, targets, run)
        if run["propagate"] not in _PROPAGATE:
            raise UserError(
                f"unknown '{run['propagate']}'", f"{where}: propagate", nearest(str(run["propagate"]), _PROPAGATE)
            )
        if not stages:
            raise UserError("no stages", where, f"add one of {', '.join(DEFAULT_METHOD)}")
        built = tuple(_build_stage(kind, options, where) for kind, options in stages)
        _check_order(built, where)
        if run["propagate"] not in _IN_STEP and any("cross" in stage.method.needs for stage in built):
            raise UserError("target: dense needs propagate: compressed or pruned", where, "change one of them")
        return Recipe(
            name,
            built,
            _patterns(targets.get("include", ["*"]), where),
            _patterns(targets.get("exclude", []), where),
            str(run["propagate"]),
            str(tree.get("description", "")),
            _kv_cache(run["kv_cache"], built, where),
        )

    def to_tree(self) -> dict[str, object]:
        """The mapping a YAML file of this recipe holds."""
        return {
            "description": self.description,
            "stages": [{s.kind: {"method": s.method_name, **s.options}} for s in self.stages],
            "targets": {"include": list(self.include), "exclude": list(self.exclude)},
            "propagate": self.propagate,
            **({"kv_cache": self.kv_cache} if self.kv_cache else {}),
        }

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads back."""
        return yaml.safe_dump(self.to_tree(), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the recipe's YAML."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:12]

    @property
    def methods(self) -> tuple[Method, ...]:
        """The steps in order."""
        return tuple(stage.method for stage in self.stages)

    @property
    def structured(self) -> StructuredMethod | None:
        """The step that makes matrices smaller before the walk; None if there is none."""
        first = self.stages[0].method if self.stages else None
        return first if isinstance(first, StructuredMethod) else None

    @property
    def blockwise(self) -> Recipe:
        """What is left for the walk: the recipe without its structured step, perhaps no stage at all."""
        return self if self.structured is None else dataclasses.replace(self, stages=self.stages[1:])

    @property
    def sparsity(self) -> Sparsity | None:
        """Of the last stage that zeroes weights; None if none does."""
        found = [getattr(m, "sparsity", None) for m in self.blockwise.methods if m.stage == "prune"]
        return next((sparsity for sparsity in reversed(found) if sparsity is not None), None)

    @property
    def grid(self) -> QuantGrid | None:
        """Of the weights; None if no stage quantizes."""
        found = [getattr(m, "weights", None) for m in self.methods if m.stage == "quantize"]
        return found[-1] if found else None

    def sparing(self, names: Iterable[str]) -> Recipe:
        """The recipe without these matrices, but for those that a pattern of ``include`` other than ``*`` asks for."""
        asked = [pattern for pattern in self.include if pattern != "*"]
        spared = [name for name in sorted(names) if not any(fnmatchcase(name, pattern) for pattern in asked)]
        return dataclasses.replace(self, exclude=(*self.exclude, *spared))

    def targets(self, name: str) -> bool:
        """Whether the matrix of this dotted name is to be compressed."""
        return any(fnmatchcase(name, p) for p in self.include) and not any(fnmatchcase(name, p) for p in self.exclude)


def _read_stage(entry: object, where: str) -> tuple[str, dict[str, object]]:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"a stage is one key such as 'prune: {{sparsity: 0.5}}', not {entry!r}", where)
    kind, options = next(iter(entry.items()))
    if kind not in DEFAULT_METHOD:
        raise UserError(f"unknown stage '{kind}'", where, nearest(str(kind), DEFAULT_METHOD))
    if options is not None and not isinstance(options, dict):
        raise UserError(f"stage {kind} takes a mapping, not {options!r}", where)
    return kind, dict(options or {})


def _override(
    text: str, stages: list[tuple[str, dict[str, object]]], targets: dict[str, object], run: dict[str, object]
) -> None:
    """Applies one ``stage.key=value``, ``targets.key=value`` or ``propagate=value``.

    Another method for a stage takes the options that it knows from the one it replaces.
    """
    path, equals, value = text.partition("=")
    kind, dot, key = path.strip().partition(".")
    if equals and kind in run and not dot:
        run[kind] = parse_value(value)
        return
    if not equals or not dot or not key:
        raise UserError(f"'{text}' is not stage.key=value", "--set", "write e.g. --set prune.sparsity=0.6")
    parsed = parse_value(value)
    if kind == "targets":
        _known({key: parsed}, ("include", "exclude"), "--set targets")
        targets[key] = parsed
        return
    matching = [options for stage, options in stages if stage == kind]
    if not matching:
        have = [stage for stage, _ in stages]
        raise UserError(f"the recipe has no stage '{kind}'", "--set", nearest(kind, [*have, "targets"]))
    for options in matching:
        options[key] = parsed
        if key == "method" and parsed in METHODS:
            known = {"method", *(f.name for f in dataclasses.fields(METHODS[parsed]))}  # type: ignore[arg-type]
            for other in options.keys() - known:
                del options[other]


def _build_stage(kind: str, options: dict[str, object], where: str) -> Stage:
    fields = dict(options)
    name = str(fields.pop("method", DEFAULT_METHOD[kind]))
    choices = [n for n, cls in METHODS.items() if cls.stage == kind]
    if name not in choices:
        raise UserError(f"no method '{name}' for stage {kind}", where, nearest(name, choices))
    cls = METHODS[name]
    where = f"{where}: {kind}"
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _known(fields, tuple(known), where)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
        raise UserError(f"method {name} needs '{missing[0]}'", where, f"add {missing[0]}: …")
    hints = typing.get_type_hints(cls)
    values = {key: converted(value, hints[key], key, where) for key, value in fields.items()}
    grids = [value for value in values.values() if isinstance(value, QuantGrid)]
    if name not in ("rtn", "gptq") and any(grid.kind != "int" or grid.stochastic is not None for grid in grids):
        raise UserError(f"{name} rounds to the nearest integers only", where, "use method: rtn or gptq")
    return Stage(kind, name, cls(**values), fields)


def _check_order(stages: tuple[Stage, ...], where: str) -> None:
    """Raises UserError if a stage stands where it cannot work."""
    if any(isinstance(stage.method, StructuredMethod) for stage in stages[1:]):
        raise UserError("a step that makes matrices smaller comes first, and once", where, "move it to the front")
    for i, stage in enumerate(stages):
        before = [earlier.method for earlier in stages[:i]]
        if why := stage.method.misplaced(before):
            raise UserError(why, f"{where}: {stage.kind}", "change the order of the stages, or leave one out")


def _kv_cache(value: object, stages: tuple[Stage, ...], where: str) -> str:
    if value not in ("", "fp8"):
        raise UserError(
            f"keys and values cannot be kept as {value}", f"{where}: kv_cache", "write fp8, or leave it out"
        )
    if value and not any(stage.kind == "quantize" for stage in stages):
        raise UserError("needs a quantize stage", f"{where}: kv_cache", "add one, or leave kv_cache out")
    return str(value)


def _known(tree: dict[str, object], known: Iterable[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where, nearest(str(key), known))


def _patterns(value: object, where: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"targets are shell patterns such as '*.down_proj', not {value!r}", where)
    return tuple(items)
