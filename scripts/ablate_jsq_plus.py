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
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.api import Options, compress
from llmcompress.recipe import Recipe

PATTERNS = {"50 %": 0.5, "2:4": "2:4"}
PRUNE = {"method": "sparsegpt", "target": "dense", "refit": True, "grow": 8}
SMOOTH = {"method": "smoothquant", "alpha": "auto"}
ROUND = {"method": "gptq", "weights": "int8", "activations": "int8", "target": "dense"}
RAMP = 0.09
JSQ_STAGES = [
    {"prune": {"method": "jsq", "rho": "auto"}},
    {"smooth": {"method": "smoothquant", "alpha": 0.8}},
    {"quantize": {"method": "rtn", "weights": "int8", "activations": "int8"}},
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    pattern: str
    part: str
    change: str
    recipe: Recipe


def rows() -> Iterator[Row]:
    """All of them, pattern by pattern."""
    for pattern, sparsity in PATTERNS.items():
        ramp = {} if isinstance(sparsity, str) else {"ramp": RAMP}

        def row(part: str, change: str, stages: list[dict[str, Any]], propagate: str = "compressed") -> Row:
            filled = [{k: v | ({"sparsity": sparsity} if k == "prune" else {}) for k, v in s.items()} for s in stages]
            tree = {"stages": filled, "propagate": propagate}
            return Row(pattern, part, change, Recipe.from_tree(tree, "jsq-plus-ablation"))

        def plus(
            part: str, change: str, prune: dict[str, Any], smooth: dict[str, Any], rounding: dict[str, Any]
        ) -> Row:
            return row(part, change, [{"prune": prune}, {"smooth": smooth}, {"quantize": rounding}])

        for mode in ("compressed", "pruned", "block"):
            yield row("JSQ", f"propagate: {mode}", JSQ_STAGES, mode)
        yield from added(plus, PRUNE | ramp)
        yield from removed(plus, PRUNE | ramp)


def added(plus: Any, whole: dict[str, Any]) -> Iterator[Row]:
    """From SparseGPT + SmoothQuant to the whole recipe."""
    prune: dict[str, Any] = {"method": "sparsegpt"}
    smooth: dict[str, Any] = {"method": "smoothquant", "alpha": 0.8}
    rounding: dict[str, Any] = {"method": "rtn", "weights": "int8", "activations": "int8"}
    yield plus("added", "SparseGPT + SmoothQuant", prune, smooth, rounding)
    for key, name in (
        ("target", "aim at the dense outputs"),
        ("refit", "masked refit"),
        ("grow", "drop and grow"),
        ("ramp", "ramp over the blocks"),
    ):
        if key in whole:
            prune = prune | {key: whole[key]}
            yield plus("added", f"+ {name}", prune, smooth, rounding)
    yield plus("added", "+ compensated rounding", prune, smooth, ROUND)
    yield plus("added", "+ α by exact error: jsq-plus", prune, SMOOTH, ROUND)


def removed(plus: Any, whole: dict[str, Any]) -> Iterator[Row]:
    """The whole recipe with one part taken away or replaced."""
    without = {k: v for k, v in whole.items() if k != "ramp"}
    yield plus("removed", "aim at the weights' own outputs", whole | {"target": "compressed"}, SMOOTH, ROUND)
    yield plus("removed", "no refit, no drop and grow", whole | {"refit": False, "grow": 0}, SMOOTH, ROUND)
    yield plus("removed", "no drop and grow", whole | {"grow": 0}, SMOOTH, ROUND)
    yield plus("removed", "3 rounds of drop and grow", whole | {"grow": 3}, SMOOTH, ROUND)
    if "ramp" in whole:
        yield plus("removed", "no ramp", without, SMOOTH, ROUND)
        yield plus("removed", "twice the ramp", whole | {"ramp": 2 * RAMP}, SMOOTH, ROUND)


def measure(row: Row, model: str, options: Options) -> dict[str, Any]:
    """Perplexity and KL of one row, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
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
    lines = ["# Ablation of jsq-plus", "", f"`{records[0]['settings']}`, W8A8, one seed.", ""]
    for pattern in PATTERNS:
        lines += [f"## {pattern}", "", "| part | change | perplexity | KL |", "|---|---|---:|---:|"]
        found = [r for r in records if r["pattern"] == pattern]
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
    for row in rows():
        key = {"pattern": row.pattern, "part": row.part, "change": row.change, "settings": settings}
        key["recipe"] = row.recipe.to_tree()["stages"]
        key["propagate"] = row.recipe.propagate
        found = next((r for r in known if r | key == r), None)
        records.append(found or key | measure(row, args.model, options))
        print(row.pattern, row.part, row.change, records[-1]["perplexity"], records[-1]["kl"], flush=True)
        left = [r for r in known if _place(r) not in map(_place, records)]
        file.write_text(json.dumps(records + left, indent=1, ensure_ascii=False) + "\n")
        (args.out / "jsq_plus_ablation.md").write_text(markdown(records))


if __name__ == "__main__":
    main()
