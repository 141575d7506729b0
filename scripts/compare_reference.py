"""Runs recipes on small reference models and sets the figures beside those of the papers' own code.

    python scripts/compare_reference.py --shared ../shared --output scripts/results/reference.json

The reference file says how its figures were measured: 64 rows of 512 tokens of one text for calibration, up to 119
rows of another for evaluation, float32. Results are merged into the output file; rows found there are not run again."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from llmcompress.api import Options, compress
from llmcompress.table import aligned

#: recipe, overrides, model → name of the row in the reference file
ROWS = [
    ("tiny-llama", "rtn-w8a8", [], "rtn-w8a8"),
    ("tiny-llama", "smoothquant-w8a8", [], "smooth-w8a8"),
    ("tiny-llama", "rtn-w8a8", ["quantize.weights=int6", "quantize.activations=int6"], "rtn-w6a6"),
    ("tiny-llama", "magnitude-50", [], "mag50"),
    ("tiny-llama", "wanda-50", [], "wanda50"),
    ("tiny-llama", "wanda-4of8", [], "wanda4:8"),
    ("tiny-llama", "wanda-2of4", [], "wanda2:4"),
    ("tiny-llama", "wanda-50", ["propagate=block"], "wanda50"),
    ("tiny-llama", "wanda-4of8", ["propagate=block"], "wanda4:8"),
    ("tiny-llama", "wanda-2of4", ["propagate=block"], "wanda2:4"),
    ("tiny-llama", "sparsegpt-50", [], "sparsegpt50"),
    ("tiny-llama", "sparsegpt-4of8", [], "sparsegpt4:8"),
    ("tiny-llama", "sparsegpt-2of4", [], "sparsegpt2:4"),
    ("tiny-llama", "wanda-smoothquant", [], "wanda50-smooth-w8a8"),
    ("tiny-llama", "jsq", [], "jsq50-smooth-w8a8"),
    ("tiny-llama", "jsq-4of8", [], "jsq4:8-smooth-w8a8"),
    ("tiny-llama", "jsq-2of4", [], "jsq2:4-smooth-w8a8"),
    ("tiny-llama", "sparsegpt-smoothquant", [], "sparsegpt50-smooth-w8a8"),
    ("tiny-llama-outliers", "rtn-w8a8", [], "rtn-w8a8"),
    ("tiny-llama-outliers", "smoothquant-w8a8", [], "smooth-w8a8"),
    ("tiny-llama-outliers", "jsq", ["prune.sparsity=0"], "smooth-w8a8"),
    ("tiny-llama-outliers", "wanda-smoothquant", [], "wanda50-smooth-w8a8"),
    ("tiny-llama-outliers", "jsq", [], "jsq50-smooth-w8a8"),
]


def main() -> None:
    """Runs the rows that match and prints ours beside the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    parser.add_argument("--output", type=Path, default=Path("scripts/results/reference.json"))
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--text", default="books-heldout", help="text to evaluate on: books-heldout or wikitext2-test")
    options = parser.parse_args()
    reference = json.loads((options.shared / "models" / "reference.json").read_text())["papers_code"]
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for model, recipe, overrides, name in ROWS:
        key = f"{model} {' '.join([recipe, *overrides])} {options.text}"
        if options.only in key and key not in found:
            found[key] = run(options.shared, model, recipe, overrides, options.text)
            found[key]["reference"] = reference[model].get(name, {}).get(options.text)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(found, indent=2) + "\n")
            print(key, found[key], flush=True)
    print(table(found))


def run(shared: Path, model: str, recipe: str, overrides: list[str], text: str) -> dict[str, object]:
    """Figures of one recipe on one model."""
    run_options = Options(
        calibration=str(shared / "data" / "books-calibration.txt"),
        samples=64,
        eval_text=str(shared / "data" / f"{text}.txt"),
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        report = compress(shared / "models" / model, recipe, Path(folder) / "out", run_options, overrides=overrides)
    return {
        "dense_ppl": report.perplexity["before"],
        "ppl": report.perplexity["after"],
        "kl": report.kl_divergence,
        "top1": report.top1_agreement,
        "seconds": report.seconds,
    }


def table(found: dict[str, dict]) -> str:
    """Ours beside the papers' code."""
    rows = [["run", "ppl", "reference", "KL", "reference"]]
    for key, ours in found.items():
        theirs = ours["reference"] or {"ppl": float("nan"), "kl": float("nan")}
        rows.append([key, f"{ours['ppl']:.3f}", f"{theirs['ppl']:.3f}", f"{ours['kl']:.5f}", f"{theirs['kl']:.5f}"])
    return aligned(rows)


if __name__ == "__main__":
    main()
