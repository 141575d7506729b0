"""Memory does not grow with the model: the high-water mark of runs over random Llamas of 4, 16 and 64 equal blocks, and
the seconds and memory of runs at the size of Llama-7B.

    python scripts/bench_streaming.py [--blocks 4 16 64] [--recipe sparsegpt-2of4] [--hidden 1024]
    python scripts/bench_streaming.py --preset llama-7b [--recipe jsq-2of4]    # writes 13.5 GB to --folder first
    python scripts/bench_streaming.py --report FOLDER                     # takes up a run that was made by hand

Each run is a process of its own, as a user would start it, on stored random token rows, without evaluation. Its seconds
are the wall's, which other work on the machine lengthens; beside them are those that its threads computed. Beside its
mark stands the bound: one block in the working dtype, its float32 copies and statistics, the live activations, and
1.5 GiB for the interpreter, its libraries and the allocator. Writes scripts/results/streaming.json."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import PRESETS, Shape, write_checkpoint
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "streaming.json"
ALLOWANCE = 3 << 29


def bound_bytes(shape: Shape, tokens: int, item: int) -> int:
    """What a run may take: a block and the float32 copies of its largest input group, a Gram matrix of the widest input
    with its factor, rows of the residual stream and of the widest input, and the allowance."""
    shared = shape.hidden // shape.heads * shape.kv_heads
    attention, mlp = shape.hidden * (2 * shape.hidden + 2 * shared), 3 * shape.hidden * shape.intermediate
    copies = 2 * 4 * 2 * shape.hidden * shape.intermediate
    widest = max(shape.hidden, shape.intermediate)
    statistics, live = 3 * 4 * widest**2, tokens * (3 * shape.hidden + 2 * widest) * item
    return item * (attention + mlp) + copies + statistics + live + ALLOWANCE


def measure(
    model: Path, shape: Shape, recipe: str, rows: tuple[int, int], folder: Path, more: list[str]
) -> dict[str, Any]:
    """One run in a process of its own; its seconds, memory and bytes."""
    tokens, output = folder / "rows.safetensors", folder / "out"
    draw = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, shape.vocab, rows, generator=draw)}, tokens)
    command = [sys.executable, "-m", "llmcompress", "--model", str(model), "--recipe", recipe, "--no-eval", "--json"]
    command += [
        "--calibration",
        str(tokens),
        "--samples",
        str(rows[0]),
        "--length",
        str(rows[1]),
        "--output",
        str(output),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = read(output, shape, rows)
    shutil.rmtree(output)
    return found | {"cpu_seconds": cpu, "options": more}


def read(output: Path, shape: Shape, rows: tuple[int, int]) -> dict[str, Any]:
    """Figures of a finished run."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    item = 4 if report["calibration"].get("dtype") == "float32" or shape.hidden < 2048 else 2
    peak, bound = report["peak_memory_bytes"], bound_bytes(shape, rows[0] * rows[1], item)
    return {
        "recipe": report["recipe"],
        "blocks": len(report["blocks"]),
        "rows": list(rows),
        "seconds": report["seconds"],
        "seconds_by_phase": report["seconds_by_phase"],
        "seconds_of_blocks": [block["seconds"] for block in report["blocks"]],
        "peak_memory_bytes": peak,
        "peak_memory_by_block": [block["peak_memory_bytes"] for block in report["blocks"]],
        "bound_bytes": bound,
        "model_bytes": report["size_bytes"]["before"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
    }


def show(name: str, found: dict[str, Any]) -> None:
    gib = {key: found[key] / 2**30 for key in ("peak_memory_bytes", "bound_bytes", "model_bytes")}
    print(
        f"{name}: {found['recipe']}, {found['blocks']} blocks of a model of {gib['model_bytes']:.2f} GiB, "
        f"{found['seconds']:.0f} s, peak {gib['peak_memory_bytes']:.2f} GiB of at most {gib['bound_bytes']:.2f}",
        flush=True,
    )


def write(key: str, found: dict[str, Any]) -> None:
    tree = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(tree | {key: found}, indent=1) + "\n", encoding="utf-8")
    show(key, found)


def main() -> None:
    """Parses the sizes, runs, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--recipe", default="sparsegpt-2of4")
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--offload-activations", action="store_true")
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; default: one that is removed")
    parser.add_argument("--report", type=Path, help="output folder of a run at the size of --preset (llama-7b)")
    options = parser.parse_args()
    rows, more = (options.samples, options.length), ["--offload-activations"] * options.offload_activations
    suffix = "".join(" offloaded" for _ in more)
    if options.report:
        shape = PRESETS[options.preset or "llama-7b"]
        found = read(options.report, shape, rows)
        write(f"{options.preset or 'llama-7b'} {found['recipe']}{suffix}", found)
        return
    small = Shape(options.hidden, options.hidden * 11 // 4, 1, options.hidden // 64, options.hidden // 64, vocab=8000)
    shapes = [PRESETS[options.preset]] if options.preset else [replace(small, blocks=n) for n in options.blocks]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for shape in shapes:
            model = Path(folder) / "model"
            write_checkpoint(model, shape)
            name = options.preset or f"hidden {shape.hidden}, {shape.blocks} blocks"
            found = measure(model, shape, options.recipe, rows, Path(folder), more)
            write(f"{name} {options.recipe}{suffix}", found)
            shutil.rmtree(model)


if __name__ == "__main__":
    main()
