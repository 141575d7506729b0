"""Whether what a folder of this program says about itself agrees: record, recipe, report, card, quantization_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.export.card import metrics
from llmcompress.export.destination import RECORD
from llmcompress.export.quantized import Scheme
from llmcompress.inspection.figures import MatrixFigures
from llmcompress.inspection.files import read_json
from llmcompress.inspection.values import Claim
from llmcompress.inspection.verdict import Verdict
from llmcompress.recipe import Recipe
from llmcompress.report import Report

_REPORT, _RECIPE, _CARD = "report.json", "recipe.yaml", "README.md"


def read_claims(record: Mapping[str, Any], recipe: Recipe | None, verdict: Verdict) -> dict[str, Claim]:
    """What the record says of each matrix; what cannot be understood is noted as wrong."""
    pattern = _pattern(record, verdict)
    uneven = recipe is not None and any(getattr(m, "uneven", False) for m in recipe.methods)
    claims = {}
    matrices = record.get("matrices")
    for name, said in matrices.items() if isinstance(matrices, dict) else ():
        try:
            shape = tuple(int(extent) for extent in said["shape"])
            each = pattern if pattern and (pattern.m or not uneven) else None
            claims[name] = Claim(shape, int(said["zeros"]), float(said["bits"]), each)
        except (KeyError, TypeError, ValueError, OverflowError):
            verdict.fail("record", name, f"{RECORD} has no shape, zeros and bits of it")
    if not isinstance(matrices, dict):
        verdict.fail("record", RECORD, "lists no matrices")
    return claims


def read_recipe(folder: Path, record: Mapping[str, Any], verdict: Verdict) -> Recipe | None:
    """The recipe beside the weights, seen to be the one the record names."""
    said = record.get("recipe")
    if not (folder / _RECIPE).is_file() or not isinstance(said, dict):
        verdict.fail("recipe", _RECIPE, "is missing" if isinstance(said, dict) else f"{RECORD} names no recipe")
        return None
    try:
        recipe = Recipe.load(folder / _RECIPE)
    except UserError as error:
        verdict.fail("recipe", _RECIPE, str(error))
        return None
    verdict.require(recipe.hash == said.get("hash"), "recipe", _RECIPE, f"is not the recipe that {RECORD} names")
    pattern = str(recipe.sparsity) if recipe.sparsity else "dense"
    what = f"says {record.get('pattern')}, the recipe {pattern}"
    if record.get("pattern") != pattern:
        verdict.fail("recipe", f"{RECORD}: pattern", what)
    return recipe


def check_grids(recipe: Recipe, schemes: Mapping[str, Scheme], claims: Mapping[str, Claim], verdict: Verdict) -> None:
    """The schemes that quantization_config gives the matrices against the recipe: grids of weights and inputs."""
    steps = [m for m in recipe.methods if m.stage == "quantize"]
    if not steps or recipe.grid is None:
        for name in schemes:
            verdict.fail("config", name, "is quantized, though the recipe does not quantize")
        return
    wanted = Scheme(recipe.grid, getattr(steps[-1], "activations", None)).stored()
    for name, scheme in schemes.items():
        if name not in claims:
            verdict.fail("record", name, f"is quantized, but {RECORD} does not list it")
            continue
        found = replace(scheme, outputs=None).stored()
        what = f"quantization_config has {_spoken(found)}; the recipe {_spoken(wanted)}"
        verdict.require(found == wanted, "config", name, what)


def check_report(
    folder: Path, record: Mapping[str, Any], claims: Mapping[str, Claim], size_bytes: int, verdict: Verdict
) -> None:
    """report.json against the record, the tensors and itself, and the card against it."""
    content = read_json(folder / _REPORT, "report", verdict)
    if content is None:
        verdict.fail("report", _REPORT, "is missing or not readable")
        return
    try:
        report = Report.from_json((folder / _REPORT).read_text(encoding="utf-8"))
        again = report.to_dict()
        listed = {str(m.name): (tuple(m.shape), m.zeros, float(m.bits)) for m in report.matrices}
        said_size, figures = report.size_bytes["after"], metrics(report)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, ZeroDivisionError) as error:
        verdict.fail("report", _REPORT, f"not a report of this program: {str(error)[:120]}")
        return
    for key in ("effective_bits", "sparsity"):
        said, found = content.get(key), again[key]
        what = f"says {said}, its matrices make {found}"
        verdict.require(_close(said, found), "report", f"{_REPORT}: {key}", what)
    what = f"says {said_size}, the tensors take {size_bytes}"
    verdict.require(said_size == size_bytes, "report", f"{_REPORT}: size_bytes.after", what)
    ours_by_key = {key: record.get(key) for key in ("model", "seed", "versions", "structure")}
    for key, ours in (ours_by_key | {"recipe": _name(record)}).items():
        what = f"says {content.get(key)}, {RECORD} {ours}"
        verdict.require(content.get(key) == ours, "report", f"{_REPORT}: {key}", what)
    for name in sorted(listed.keys() ^ claims.keys()):
        verdict.fail("report", f"{_REPORT}: {name}", f"only one of {_REPORT} and {RECORD} lists it")
    for name in sorted(listed.keys() & claims.keys()):
        (shape, zeros, bits), claim = listed[name], claims[name]
        agrees = shape == claim.shape and zeros == claim.zeros and _close(bits, claim.bits)
        what = f"{shape}, {zeros} zeros, {bits} bits; {RECORD}: {claim.shape}, {claim.zeros} zeros, {claim.bits} bits"
        verdict.require(agrees, "report", f"{_REPORT}: {name}", what)
    _check_card(folder, figures, verdict)


def check_total_sparsity(pattern: object, figures: list[MatrixFigures], verdict: Verdict) -> None:
    """A ratio that grows over the blocks holds for the whole only."""
    weights, zeros = sum(f.weights for f in figures), sum(f.zeros for f in figures)
    sparsity = Sparsity.parse(pattern)
    least = sparsity.ratio * weights - sum(max(f.shape) for f in figures)
    what = f"{zeros} zeros of {weights} are fewer than the ratio {sparsity} asks for"
    if zeros < least:
        verdict.fail("masks", "all matrices", what)


def _check_card(folder: Path, figures: Mapping[str, float], verdict: Verdict) -> None:
    """The figures in the card's metadata are the report's."""
    card = folder / _CARD
    if not card.is_file():
        verdict.skip(f"{_CARD}: there is none")
        return
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        results: list[EvalResult] = data.get("eval_results") or []
        found = {r.metric_type: r.metric_value for r in results if r.metric_type in figures}
    except (ValueError, OSError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        verdict.fail("card", _CARD, f"its metadata cannot be read: {str(error)[:120]}")
        return
    for kind, value in figures.items():
        if kind not in found:  # an author may take figures out of the card
            verdict.skip(f"{_CARD}: gives no {kind}")
            continue
        what = f"gives {kind} {found[kind]}, {_REPORT} {value}"
        verdict.require(_close(found[kind], value), "card", _CARD, what)


def _pattern(record: Mapping[str, Any], verdict: Verdict) -> Sparsity | None:
    said = record.get("pattern")
    if said in (None, "dense"):
        return None
    try:
        return Sparsity.parse(said)
    except UserError as error:
        verdict.fail("record", f"{RECORD}: pattern", error.what)
        return None


def _spoken(scheme: Scheme) -> str:
    return f"weights {_fields(scheme.weights)}, inputs {_fields(scheme.activations)}"


def _fields(grid: object) -> str:
    if not is_dataclass(grid):
        return "as they are"
    return " ".join(f"{f.name}={getattr(grid, f.name)}" for f in fields(grid) if f.name != "observer")


def _name(record: Mapping[str, Any]) -> object:
    recipe = record.get("recipe")
    return recipe.get("name") if isinstance(recipe, dict) else None


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))
    return bool(a == b)
