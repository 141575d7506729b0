"""What each part of `jsq-plus` is worth: added to SparseGPT + SmoothQuant one after the other, taken away from the
whole one at a time, and in place of its parts what was tried and dropped. Also what JSQ's tokens go on through.

    python scripts/ablate_jsq_plus.py --model llama --calibration ../shared/data/books-calibration.txt \\
        --eval-text ../shared/data/books-heldout.txt

writes jsq_plus_ablation.json, one record per row as soon as it is found, and jsq_plus_ablation.md into ``--out``. Rows
recorded with the same recipe and settings are skipped, so an interrupted run goes on; after a change of the code give
--force."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smooth_inside import smooth_inside

from llmcompress.api import Options, compress
from llmcompress.calibration import token_rows
from llmcompress.model.locate import locate
from llmcompress.recipe import Recipe

PRUNE = {"method": "sparsegpt", "target": "dense", "refit": True, "grow": 3}
SMOOTH = {"method": "smoothquant", "alpha": "auto"}
ROUND = {"method": "gptq", "weights": "int8", "activations": "int8", "target": "dense"}
RATIOS = {"ratios": "auto"}
RAMP = 0.09
OWN = {"target": "compressed"}
JSQ = (
    {"method": "jsq", "rho": "auto"},
    {"method": "smoothquant", "alpha": 0.8},
    {"method": "rtn", "weights": "int8", "activations": "int8"},
)


@dataclass(frozen=True)
class Row:
    """One line of the table; ``inside`` is the α of `smooth_inside` in front of the recipe, 0 for none of it."""

    pattern: str
    part: str
    change: str
    recipe: Recipe
    inside: float = 0.0


@dataclass(frozen=True)
class Pattern:
    """What the rows of one sparsity have in common."""

    name: str
    sparsity: float | str
    bits: dict[str, Any] = field(default_factory=dict)

    @property
    def prune(self) -> dict[str, Any]:
        """The whole recipe's prune stage."""
        return PRUNE if isinstance(self.sparsity, str) else PRUNE | RATIOS

    def row(
        self, part: str, change: str, *steps: dict[str, Any], propagate: str = "compressed", inside: float = 0.0
    ) -> Row:
        """A recipe of a prune, a smooth and a quantize stage."""
        steps = ({"sparsity": self.sparsity} | steps[0], steps[1], steps[2] | self.bits)
        stages = [{kind: step} for kind, step in zip(("prune", "smooth", "quantize"), steps, strict=True)]
        recipe = Recipe.from_tree({"stages": stages, "propagate": propagate}, "jsq-plus-ablation")
        return Row(self.name, part, change, recipe, inside)

    def rows(self) -> Iterator[Row]:
        """All of them; where fewer bits are asked for, what they may make a difference to."""
        if self.bits:
            yield self.row("whole", "jsq-plus", self.prune, SMOOTH, ROUND)
            yield from inside(self)
            return
        for mode in ("compressed", "pruned", "block") if "ratios" in self.prune else ("compressed",):
            yield self.row("JSQ", f"propagate: {mode}", *JSQ, propagate=mode)
        yield from added(self)
        yield from removed(self)


SIX = {"weights": "int6", "activations": "int6"}
PATTERNS = (Pattern("50 %", 0.5), Pattern("2:4", "2:4"), Pattern("W6A6 + 50 %", 0.5, SIX))


def added(pattern: Pattern) -> Iterator[Row]:
    """From SparseGPT + SmoothQuant to the whole recipe."""
    whole = pattern.prune
    prune: dict[str, Any] = {"method": "sparsegpt"}
    smooth: dict[str, Any] = {"method": "smoothquant", "alpha": 0.8}
    rounding: dict[str, Any] = {"method": "rtn", "weights": "int8", "activations": "int8"}
    yield pattern.row("added", "SparseGPT + SmoothQuant", prune, smooth, rounding)
    for key, name in (
        ("target", "aim at the dense outputs"),
        ("refit", "masked refit"),
        ("grow", "drop and grow"),
        ("ratios", "ratios by sensitivity"),
    ):
        if key in whole:
            prune = prune | {key: whole[key]}
            yield pattern.row("added", f"+ {name}", prune, smooth, rounding)
    yield pattern.row("added", "+ compensated rounding", prune, smooth, ROUND)
    yield pattern.row("added", "+ α by exact error: jsq-plus", prune, SMOOTH, ROUND)


def removed(pattern: Pattern) -> Iterator[Row]:
    """The whole recipe with one part taken away or replaced."""
    whole = pattern.prune
    even = {k: v for k, v in whole.items() if k != "ratios"}
    yield pattern.row("removed", "aim at the weights' own outputs", whole | OWN, SMOOTH, ROUND | OWN)
    yield pattern.row("removed", "no refit, no drop and grow", whole | {"refit": False, "grow": 0}, SMOOTH, ROUND)
    yield pattern.row("changed", "three times the drop and grow", whole | {"grow": 9}, SMOOTH, ROUND)
    for score, name in ((JSQ[0], "JSQ's"), ({"method": "wanda"}, "Wanda's")):
        yield pattern.row("changed", f"{name} mask, refitted, no drop and grow", score, SMOOTH, ROUND | {"refit": True})
    yield from inside(pattern)
    if "ratios" in whole:
        yield pattern.row("removed", "the same ratio in every block", even, SMOOTH, ROUND)
        for ramp in (RAMP, 2 * RAMP):
            yield pattern.row("changed", f"ramp {ramp} over the blocks", even | {"ramp": ramp}, SMOOTH, ROUND)


def inside(pattern: Pattern) -> Iterator[Row]:
    """Smoothing of what no norm stands in front of."""
    for alpha in (0.5, 0.8):
        name = f"o_proj and down_proj smoothed too, α {alpha}"
        yield pattern.row("changed", name, pattern.prune, SMOOTH, ROUND, inside=alpha)


def measure(row: Row, model: str, options: Options) -> dict[str, Any]:
    """Perplexity and KL of one row, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        if row.inside:
            dense, model = locate(model), str(Path(folder) / "smoothed")
            shutil.copytree(dense, model)
            smooth_inside(dense, token_rows(options.calibration_rows, dense), Path(model), row.inside)
        report = compress(model, row.recipe, Path(folder) / "out", options)
    return {
        "perplexity": report.perplexity["after"],
        "dense_perplexity": report.perplexity["before"],
        "kl": report.kl_divergence,
        "seconds": round(report.seconds, 1),
    }


def _place(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["pattern"], record["part"], record["change"]


def markdown(records: list[dict[str, Any]]) -> str:
    """The table, one section per pattern."""
    settings = records[0]["settings"]
    lines = [
        "# Ablation of jsq-plus",
        "",
        f"{settings['model']}, W8A8 where nothing else is said, calibrated on {settings['calibration']}, judged on",
    ]
    lines += [f"{settings['eval_text']}; one seed. Made by `scripts/ablate_jsq_plus.py`, which resumes.", ""]
    for pattern in (p for p in PATTERNS if any(r["pattern"] == p.name for r in records)):
        lines += [f"## {pattern.name}", "", "| part | change | perplexity | KL |", "|---|---|---:|---:|"]
        found = [r for r in records if r["pattern"] == pattern.name]
        lines += [f"| {r['part']} | {r['change']} | {r['perplexity']:.3f} | {r['kl']:.4f} |" for r in found]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    parser.add_argument("--force", action="store_true", help="measure rows anew that are recorded")
    args = parser.parse_args()
    options = Options(calibration=args.calibration, samples=args.samples, eval_text=args.eval_text, dtype="float32")
    settings = {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} rows of {Path(args.calibration).name}",
        "eval_text": Path(args.eval_text).name,
    }
    file = args.out / "jsq_plus_ablation.json"
    known = json.loads(file.read_text()) if file.is_file() and not args.force else []
    records = []
    for row in (row for pattern in PATTERNS for row in pattern.rows()):
        key = {"pattern": row.pattern, "part": row.part, "change": row.change, "settings": settings}
        key["recipe"] = row.recipe.to_tree()["stages"]
        key["propagate"] = row.recipe.propagate
        key |= {"inside": row.inside} if row.inside else {}
        found = next((r for r in known if r | key == r), None)
        records.append(found or key | measure(row, args.model, options))
        print(row.pattern, row.part, row.change, records[-1]["perplexity"], records[-1]["kl"], flush=True)
        left = [r for r in known if _place(r) not in map(_place, records)]
        file.write_text(json.dumps(records + left, indent=1, ensure_ascii=False) + "\n")
        (args.out / "jsq_plus_ablation.md").write_text(markdown(records))


if __name__ == "__main__":
    main()
