"""The table JSQ is known by, on any model: methods × budgets, with what each keeps of the model and what it costs.

    python scripts/table_jsq.py --model llama --calibration ../shared/data/books-calibration.txt \\
        --eval-text ../shared/data/books-heldout.txt ../shared/data/wikitext2-test.txt --seeds 3 --out table-jsq

A cell is a method at a budget with a seed. Seed s calibrates on the rows s·N … (s+1)·N of the calibration source, so
seed 0 is what `python -m llmcompress --calibration FILE --samples N` runs; ``self`` samples the model with seed s.
Every cell is compressed into a folder, judged on every text (`table_jsq_judge`), recorded, and the folder deleted.

``--out`` gets table.json (one record per cell, written after each), table.md and table.png. A second run skips cells
that are recorded with the same recipe, tokens, model, package versions and dtype, so an interrupted table goes on;
after a change of the code at the same version, give --force. Seconds are wall clock, without evaluation; table.json
also has those of the whole cell, and the processor time of all threads, which other programs disturb less.

Budgets that a method cannot meet (LLM-Pruner removes whole heads and channels, the same number in every block) are
recorded with the reason; what it did remove is in the table. Methods whose recipes are not there are left out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from table_jsq_judge import EvalText, Judge, fingerprint, multiply_accumulates
from table_jsq_show import markdown, plot

from llmcompress.api import Options, compress
from llmcompress.calibration import SELF, Calibration, token_rows
from llmcompress.errors import UserError
from llmcompress.measure import versions
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.source import Source, draw_tokens

#: budget → what it says in recipes: sparsity, bits of weights and of inputs; ending of recipes made for it
BUDGETS: dict[str, tuple[tuple[str, ...], str]] = {
    "W8A8": (("prune.sparsity=0",), "-w8a8"),
    "W8A8 + 43.75 %": (("prune.sparsity=0.4375",), ""),
    "W8A8 + 50 %": (("prune.sparsity=0.5",), ""),
    "W8A8 + 2:4": (("prune.sparsity=2:4",), "-2of4"),
    "W8A8 + 4:8": (("prune.sparsity=4:8",), "-4of8"),
    "W6A6": (("prune.sparsity=0", "quantize.weights=int6", "quantize.activations=int6"), "-w6a6"),
    "W6A6 + 50 %": (("prune.sparsity=0.5", "quantize.weights=int6", "quantize.activations=int6"), "-w6a6-50"),
    "W4A8 + 2:4": (("prune.sparsity=2:4", "quantize.weights=int4-g128"), "-w4a8-2of4"),
    "85.94 %": (("prune.sparsity=0.859375",), ""),
}
JOINT = tuple(budget for budget in BUDGETS if budget.startswith("W") and "+" in budget)

#: method → its recipe and the budgets it has a row at. Where a recipe of that name with the budget's ending is there,
#: it is taken as it is; else the plain one with the budget's overrides.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Wanda": ("wanda-50", ("85.94 %",)),
    "SparseGPT": ("sparsegpt-50", ("85.94 %",)),
    "LLM-Pruner": ("llm-pruner-20", ("85.94 %",)),
    "LLM-Pruner + SmoothQuant": ("llm-pruner-w8a8", ("W8A8 + 43.75 %", "W8A8 + 50 %", "W6A6 + 50 %")),
    "SmoothQuant": ("smoothquant", ("W8A8", "W6A6")),
    "OmniQuant": ("omniquant", ("W8A8", "W6A6")),
    "Wanda + SmoothQuant": ("wanda-smoothquant", JOINT),
    "SparseGPT + SmoothQuant": ("sparsegpt-smoothquant", JOINT),
    "JSQ": ("jsq", ("W6A6", *JOINT)),
    "OBR": ("obr", ("W6A6", *JOINT)),
    "JSQ-plus": ("jsq-plus", ("W6A6", *JOINT)),
}


@dataclass(frozen=True)
class Cell:
    """A method at a budget with a seed, and what that means."""

    method: str
    budget: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def place(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"method": self.method, "budget": self.budget, "seed": self.seed}


def recipe_for(method: str, budget: str, known: list[str]) -> tuple[str, tuple[str, ...]] | None:
    """Recipe and overrides of a method at a budget; None if its recipe is not among the ``known``."""
    base = METHODS[method][0]
    overrides, ending = BUDGETS[budget]
    if ending and base + ending in known:
        return base + ending, ()
    return (base, overrides) if base in known else None


def cells(methods: list[str], budgets: list[str], seeds: int) -> Iterator[Cell]:
    """Seed after seed, so that a whole table is there as early as can be; budget after budget in each."""
    known = Recipe.names()
    for seed in range(seeds):
        for budget in budgets:
            for method in methods:
                found = recipe_for(method, budget, known) if budget in METHODS[method][1] else None
                if found:
                    yield Cell(method, budget, seed, *found)


class Records:
    """What has been found, in a file that is whole at every moment."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"dense": {}, "cells": []}

    def find(self, cell: Cell, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a cell, if it was made with the same settings."""
        matching = [r for r in self.content["cells"] if r | cell.place == r and r["settings"] == settings]
        return matching[0] if matching else None

    def put(self, record: dict[str, Any]) -> None:
        """Stores a cell's record in place of an older one."""
        place = [record[key] for key in ("method", "budget", "seed")]
        others = [r for r in self.content["cells"] if [r["method"], r["budget"], r["seed"]] != place]
        self.content["cells"] = [*others, record]
        self.write()

    def write(self) -> None:
        """Replaces the file in one step."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


class Table:
    """Runs cells on one model.

    Args:
        options: of the command line.
        work: folder for what does not stay.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.run_options = Options(
            samples=options.samples, length=options.length, evaluate=False, device=options.device, dtype=options.dtype
        )
        self.source = Source(options.model, self.run_options)
        self.rows = [self._calibration(seed) for seed in range(options.seeds)]
        folder = self.source.folder
        self.texts = [EvalText.read(t, folder, options.length, options.eval_rows or None) for t in options.eval_text]
        self.records = Records(options.out / "table.json")
        self.common = {
            "versions": versions(),
            "model": {f.name: fingerprint(f) for f in sorted(folder.glob("*.safetensors"))},
            "texts": {t.name: {"rows": list(t.tokens.shape), "tokens": t.fingerprint} for t in self.texts},
            "dtype": str(self.source.dtype), "device": self.source.device,
        }  # fmt: skip

    def run(self, wanted: list[Cell]) -> dict[str, Any]:
        """Runs the cells that are not recorded yet; returns what the table shows."""
        settings = {cell: self.settings(cell) for cell in wanted}
        due = [c for c in wanted if self.options.force or not self.records.find(c, settings[c])]
        print(f"{len(wanted)} cells, {len(wanted) - len(due)} of them recorded already", flush=True)
        if due or self.records.content["dense"].get("settings") != self.common:
            judge = Judge(self.source, self.texts, self.work)
            self.records.content["dense"] = judge.dense | {"model": self.options.model, "settings": self.common}
            self.records.write()
        for number, cell in enumerate(due, 1):
            began, worked = time.perf_counter(), time.process_time()
            record = cell.place | {"settings": settings[cell]} | self.measure(cell, judge)
            record["cell_seconds"] = time.perf_counter() - began
            record["cell_cpu_seconds"] = time.process_time() - worked
            self.records.put(record)
            print(f"[{number}/{len(due)}] {_line(record)}, {record['cell_seconds']:.0f} s", flush=True)
        found = [self.records.find(cell, settings[cell]) for cell in wanted]
        return {"dense": self.records.content["dense"], "cells": found}

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Everything a cell's figures depend on, but the code itself."""
        recipe = Recipe.load(cell.recipe, cell.overrides)
        rows = self.rows[cell.seed]
        given = {"recipe": recipe.name, "overrides": list(cell.overrides), "recipe_hash": recipe.hash}
        return given | {"calibration": {"rows": list(rows.shape), "tokens": fingerprint(rows)}} | self.common

    def measure(self, cell: Cell, judge: Judge) -> dict[str, Any]:
        """Compresses, judges and forgets; a budget that cannot be met gives the reason as ``refused``."""
        rows = self.work / "rows.safetensors"
        save_file({"input_ids": self.rows[cell.seed].contiguous()}, rows)
        given = {**vars(self.run_options), "calibration": str(rows), "seed": cell.seed}
        output = self.work / "output"
        try:
            report = compress(
                self.options.model, cell.recipe, output, Options(**given), overrides=cell.overrides, force=True
            )
        except UserError as error:
            return {"refused": str(error)}
        return {
            "size_bytes": report.size_bytes["after"],
            "safetensors_bytes": sum(f.stat().st_size for f in output.glob("*.safetensors")),
            "effective_bits": report.effective_bits,
            "sparsity": report.sparsity,
            "removed": report.structure.get("achieved"),
            **multiply_accumulates(report.matrices),
            "seconds": report.seconds,
            "texts": judge.figures(output),
        }

    def _calibration(self, seed: int) -> torch.Tensor:
        """The rows of a seed, (samples, length)."""
        o = self.options
        if o.calibration == SELF:
            source = Source(o.model, Options(**{**vars(self.run_options), "seed": seed}))
            rows, _ = draw_tokens(source, samples=o.samples, progress=Progress(silent=True))
            assert rows is not None
            return rows
        read = token_rows(Calibration(o.calibration, o.samples * (seed + 1), o.length), self.source.folder)
        return read[o.samples * seed :]


def _line(record: dict[str, Any]) -> str:
    name = f"{record['budget']}, {record['method']}, seed {record['seed']}"
    if "refused" in record:
        return f"{name}: {record['refused']}"
    quality = ", ".join(f"{text} KL {f['kl']:.4f} ppl {f['perplexity']:.3f}" for text, f in record["texts"].items())
    return f"{name}: {quality}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, data = parser.add_argument, "../shared/data"
    add("--model", default="llama", metavar="PRESET|FOLDER|HUB_ID")
    add("--calibration", default=f"{data}/books-calibration.txt", help="as `python -m llmcompress` takes it")
    texts = [f"{data}/books-heldout.txt", f"{data}/wikitext2-test.txt"]
    add("--eval-text", nargs="+", default=texts, metavar="FILE")
    add("--seeds", type=int, default=1, help="calibration sets, for mean and spread (default: 1)")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), metavar="BUDGET",
        help=", ".join(BUDGETS).replace("%", "%%"))  # fmt: skip
    add("--samples", type=int, default=64, help="calibration rows per seed (default: 64)")
    add("--length", type=int, default=512, help="tokens per row, of texts too (default: 512)")
    add("--eval-rows", type=int, default=64, help="rows of each text; 0 for all up to 119 · 512 tokens (default: 64)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--force", action="store_true", help="run cells again that are recorded")
    add("--out", type=Path, default=Path("table-jsq"), help="folder of table.json, table.md, table.png")
    o = parser.parse_args(argv)
    if o.seeds < 1 or o.eval_rows < 0:
        parser.error("--seeds is at least 1, --eval-rows at least 0")
    return o


def main(argv: list[str] | None = None) -> int:
    """Runs what is due, and writes the table and the plot."""
    options = arguments(argv)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = list(cells(options.methods, options.budgets, options.seeds))
    missing = [m for m in options.methods if m not in {c.method for c in wanted}]
    if missing:
        print(f"no rows here, for want of a recipe or of a budget: {', '.join(missing)}")
    try:
        with tempfile.TemporaryDirectory(dir=options.out) as work:
            found = Table(options, Path(work)).run(wanted)
    except UserError as error:
        print(f"table_jsq: {error}", file=sys.stderr)
        return 2
    text = markdown(found)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(found, options.out / "table.png")
    print(f"\n{text}\n{options.out}: table.json, table.md, table.png; {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
