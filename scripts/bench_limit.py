"""How close second-order compression comes to what its arithmetic must cost on this machine.

    python scripts/bench_limit.py [--threads N] [--rounds N] [--tokens N] [--shape ROWSxCOLUMNS …] [--block PRESET …]

Per matrix shape it counts the floating-point operations of the four phases,

    forward   2 · tokens · rows · columns
    gram      tokens · columns²          (one triangle)
    cholesky  columns³ / 3
    sweep     rows · columns²            (the left-looking products)

measures the rate of the primitive behind each on tensors of that shape, and takes the time of the project's own code
beside the time the primitive alone needs. Then it prunes a whole random checkpoint by SparseGPT 2:4, as a user would,
and sets the seconds of its blocks beside the sum of the primitives that they cannot do without: one product per
matrix and token (attention is not counted; the last matrix of the last block has nobody to multiply for), one Gram
matrix and one Cholesky factorisation per input group, one sweep per matrix.

Tensors are random. Writes scripts/results/limit.json."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llmcompress.process import WAITING, share_heap

os.environ.update(WAITING | os.environ)  # as the program does

import torch
from random_checkpoint import PRESETS, Shape, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from llmcompress import api
from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import add_gram, mirror
from llmcompress.core.sweep import BLOCK, Factor, factorise, sweep
from llmcompress.core.targets import Mask, Round
from llmcompress.report import Report

BLOCKS = ("tinyllama-block", "llama-7b-block")
RECIPE = "sparsegpt-2of4"
SHAPES = ("2048x2048", "5632x2048", "4096x4096", "4096x11008")
RESULTS = Path(__file__).parent / "results" / "limit.json"
#: what the sweep is timed with
TARGETS = {
    "sparsegpt 2:4": ("2:4", None),
    "sparsegpt 50 %": ("0.5", None),
    "gptq int4-g128": (None, "int4-g128"),
    "gptq int8": (None, "int8"),
    "2:4 + int4-g128": ("2:4", "int4-g128"),
}


def best_seconds(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least time of each job over interleaved rounds, after one round that is not counted."""
    best = dict.fromkeys(jobs, float("inf"))
    for round_number in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if round_number:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def left_looking_products(factor: Factor, E: Tensor) -> None:
    """The matrix products a sweep cannot do without, and nothing else; ``E`` is (columns, rows)."""
    V = factor.V
    for b in range(BLOCK, len(V), BLOCK):
        torch.mm(V[:b, b : b + BLOCK].T, E[:b])


def run_sweep(W: Tensor, factor: Factor, out: Tensor, sparsity: str | None, grid: str | None) -> None:
    """As a method does, into memory that is there."""
    mask = Mask(Sparsity.parse(sparsity), factor.V.diagonal(), len(W)) if sparsity else None
    rounding = Round(QuantGrid.parse_weights(grid), W, torch.bfloat16, mask) if grid else None
    sweep(W, factor, mask, rounding, out)


def operations(rows: int, columns: int, tokens: int) -> dict[str, float]:
    """Floating-point operations of each phase."""
    return {
        "forward": 2.0 * tokens * rows * columns,
        "gram": 1.0 * tokens * columns**2,
        "cholesky": columns**3 / 3,
        "sweep": 1.0 * rows * columns**2,
    }


def bytes_moved(rows: int, columns: int, tokens: int) -> dict[str, float]:
    """Bytes each phase must read and write at least once, in float32 (inputs in bfloat16)."""
    return {
        "forward": 2.0 * (tokens * (rows + columns) + rows * columns),
        "gram": 2.0 * tokens * columns + 4.0 * columns**2,
        "cholesky": 8.0 * columns**2,
        "sweep": 4.0 * (2 * rows * columns + columns**2 / 2),
    }


class Problem:
    """One random matrix (rows, columns) and the inputs it reads."""

    def __init__(self, rows: int, columns: int, tokens: int) -> None:
        self.W, self.weight = torch.randn(rows, columns), torch.randn(rows, columns).bfloat16()
        self.inputs = torch.randn(tokens, columns).bfloat16()
        self.total = torch.zeros(columns, columns)
        add_gram(self.total, self.inputs)
        self.H = mirror(self.total / tokens)
        self.factor, self.Q = factorise(self.H), torch.empty_like(self.W)

    def primitives(self) -> dict[str, Callable[[], object]]:
        """What each phase cannot do without."""
        E = torch.randn(self.W.T.shape)
        damped = self.H + self.factor.ridge * torch.eye(len(self.H))
        return {
            "forward": lambda: torch.mm(self.inputs, self.weight.T),
            "gram": lambda: torch.mm(self.inputs.T[: len(self.H) // 2], self.inputs),  # as many operations
            "cholesky": lambda: torch.linalg.cholesky_ex(damped),
            "sweep": lambda: left_looking_products(self.factor, E),
        }

    def phases(self) -> dict[str, Callable[[], object]]:
        """The project's own code."""
        job = (self.W, self.factor, self.Q)
        return {
            "gram": lambda: add_gram(self.total, self.inputs),
            "cholesky": lambda: factorise(self.H),
        } | {name: lambda target=target: run_sweep(*job, *target) for name, target in TARGETS.items()}


def measure(rows: int, columns: int, tokens: int, rounds: int) -> dict[str, object]:
    """Seconds of the primitives and of the project's phases for one shape."""
    problem = Problem(rows, columns, tokens)
    primitives, ours = problem.primitives(), problem.phases()
    seconds = best_seconds({f"limit {k}": job for k, job in primitives.items()} | ours, rounds)
    limit = {k: seconds.pop(f"limit {k}") for k in primitives}
    flops = operations(rows, columns, tokens)
    return {
        "shape": [rows, columns],
        "flops": flops,
        "bytes": bytes_moved(rows, columns, tokens),
        "limit_seconds": limit,
        "gflops_per_second": {k: flops[k] / limit[k] / 1e9 for k in limit},
        "seconds": seconds,
        "ratio": {
            "gram": seconds["gram"] / limit["gram"],
            "cholesky": seconds["cholesky"] / limit["cholesky"],
            **{k: (seconds[k] + seconds["cholesky"]) / (limit["sweep"] + limit["cholesky"]) for k in TARGETS},
        },
    }


def measure_block(preset: str, samples: int, length: int, rounds: int) -> dict[str, object]:
    """Seconds of a checkpoint's blocks, in the fastest of the rounds, beside those of their primitives."""
    shape = PRESETS[preset]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", shape)
        rows = torch.randint(shape.vocab, (samples, length), generator=torch.Generator().manual_seed(1))
        save_file({"input_ids": rows}, Path(folder) / "rows.safetensors")
        options = api.Options(
            str(Path(folder) / "rows.safetensors"), samples, length, evaluate=False, dtype=shape.dtype
        )
        job = (Path(folder) / "model", RECIPE, Path(folder) / "out", options)
        reports = [api.compress(*job, force=True) for _ in range(rounds)]
    limit = block_limit(shape, samples * length, rounds)
    report = min(reports, key=_block_seconds)
    seconds = _block_seconds(report)
    return {
        "preset": preset,
        "recipe": RECIPE,
        "blocks": shape.blocks,
        "tokens": samples * length,
        "seconds": seconds,
        "seconds_of_the_run": report.seconds,
        "seconds_by_phase": report.seconds_by_phase,
        "peak_memory_bytes": report.peak_memory_bytes,
        "limit_seconds": limit,
        "ratio": seconds / sum(limit.values()),
    }


def _block_seconds(report: Report) -> float:
    return sum(block.seconds for block in report.blocks)


def block_limit(shape: Shape, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds that the primitives of all blocks take, by phase."""
    h, m, kv = shape.hidden, shape.intermediate, shape.hidden * shape.kv_heads // shape.heads
    groups = [(h, [h, kv, kv]), (h, [h]), (h, [m, m]), (m, [h])]  # columns, rows of the matrices that read them
    total = dict.fromkeys(("forward", "gram", "cholesky", "sweep"), 0.0)
    for columns, readers in groups:
        best = {rows: best_seconds(Problem(rows, columns, tokens).primitives(), rounds) for rows in set(readers)}
        for phase in ("gram", "cholesky"):
            total[phase] += shape.blocks * min(seconds[phase] for seconds in best.values())
        for rows in readers:
            total["sweep"] += shape.blocks * best[rows]["sweep"]
            total["forward"] += (shape.blocks - (columns == m)) * best[rows]["forward"]
    return total


def show(result: dict[str, object]) -> None:
    rows, columns = result["shape"]
    print(f"\n{rows} x {columns}")
    for phase, seconds in result["limit_seconds"].items():
        rate = result["gflops_per_second"][phase]
        megabytes = result["bytes"][phase] / 1e6
        print(f"  limit {phase:<16} {seconds * 1e3:9.1f} ms   {rate:7.0f} GFLOP/s   {megabytes:8.0f} MB")
    for name, ratio in result["ratio"].items():
        of = "sweep + cholesky" if name in TARGETS else "phase"
        print(f"  {name:<22} {result['seconds'][name] * 1e3:9.1f} ms   {ratio:5.2f} x the limit of its {of}")


def show_block(result: dict[str, object]) -> None:
    limit = result["limit_seconds"]
    print(f"\n{result['preset']}: {result['blocks']} blocks, {result['tokens']} tokens, {result['recipe']}")
    print("  limit " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in limit.items()))
    print(
        f"  blocks {result['seconds']:.2f} s, {result['ratio']:.2f} x the limit of {sum(limit.values()):.2f} s; ",
        end="",
    )
    print(f"whole run {result['seconds_of_the_run']:.2f} s, {result['peak_memory_bytes'] / 2**20:.0f} MiB")


def main() -> None:
    share_heap()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), help="ROWSxCOLUMNS")
    parser.add_argument("--block", nargs="*", default=list(BLOCKS), help=f"of {', '.join(PRESETS)}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes, blocks = [], []
    for preset in options.block:
        blocks.append(measure_block(preset, options.tokens // 512, 512, options.rounds))
        show_block(blocks[-1])
    for shape in options.shape:
        rows, columns = map(int, shape.split("x"))
        shapes.append(measure(rows, columns, options.tokens, options.rounds))
        show(shapes[-1])
    RESULTS.parent.mkdir(exist_ok=True)
    versions = {"threads": options.threads, "tokens": options.tokens, "torch": torch.__version__}
    RESULTS.write_text(json.dumps(versions | {"shapes": shapes, "blocks": blocks}, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
