"""One process against two that share the calibration rows, one thread each.

    python scripts/bench_processes.py [--recipe sparsegpt-2of4] [--hidden 1024] [--blocks 2] [--rounds 3]

Random Llama, stored random rows, no evaluation. Compared are the seconds of the blocks, the least over interleaved
rounds; the seconds of the processors say what the wall clock would on a machine that nothing else uses. Writes
scripts/results/processes.json."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from random_checkpoint import Shape, write_checkpoint
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "processes.json"


def run(processes: int, arguments: list[str], output: Path) -> dict[str, float]:
    """One run: seconds of its blocks on the wall clock, of the processors, and its memory."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [*start, "llmcompress", *arguments, "--output", str(output), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return {
        "seconds_of_blocks": sum(block["seconds"] for block in report["blocks"]),
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_memory_bytes": report["peak_memory_bytes"],
    }


def main() -> None:
    """Parses the size, runs, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sparsegpt-2of4")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    heads = options.hidden // 64
    shape = Shape(options.hidden, options.hidden * 11 // 4, options.blocks, heads, heads, vocab=8000)
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", shape)
        rows = torch.randint(3, 8000, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": rows}, folder / "rows.safetensors")
        arguments = ["--model", str(folder / "model"), "--recipe", options.recipe, "--no-eval", "--calibration"]
        arguments += [str(folder / "rows.safetensors"), "--samples", str(options.samples)]
        arguments += ["--length", str(options.length)]
        for _ in range(options.rounds):
            for processes, runs in found.items():
                runs.append(run(processes, arguments, folder / "out"))
    best = {processes: min(run["seconds_of_blocks"] for run in runs) for processes, runs in found.items()}
    tree = {
        "recipe": options.recipe, "hidden": options.hidden, "blocks": options.blocks,
        "rows": [options.samples, options.length], "runs": {str(key): runs for key, runs in found.items()},
        "seconds": {str(key): seconds for key, seconds in best.items()}, "speed_up": best[1] / best[2],
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"{options.recipe}: one process {best[1]:.1f} s, two {best[2]:.1f} s: {best[1] / best[2]:.2f} times as fast")


if __name__ == "__main__":
    main()
