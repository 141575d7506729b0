"""How close second-order compression comes to what its arithmetic must cost on this machine.

    python scripts/bench_limit.py [--threads N] [--rounds N] [--tokens N] [--shape ROWSxCOLUMNS …]

Per matrix shape it counts the floating-point operations of the four phases,

    forward   2 · tokens · rows · columns
    gram      tokens · columns²          (one triangle)
    cholesky  columns³ / 3
    sweep     rows · columns²            (the left-looking products)

measures the rate of the primitive behind each on tensors of that shape, and takes the time of the project's own code
beside the time the primitive alone needs. Tensors are random. Writes scripts/results/limit.json."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import add_gram, mirror
from llmcompress.core.sweep import Factor, factorise, sweep
from llmcompress.core.targets import BLOCK, Mask, Round

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


def run_sweep(W: Tensor, factor: Factor, sparsity: str | None, grid: str | None) -> None:
    mask = Mask(Sparsity.parse(sparsity), factor.V.diagonal(), len(W)) if sparsity else None
    rounding = Round(QuantGrid.parse_weights(grid), W, torch.bfloat16, mask) if grid else None
    sweep(W, factor, mask, rounding)


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


def measure(rows: int, columns: int, tokens: int, rounds: int) -> dict[str, object]:
    """Seconds of the primitives and of the project's phases for one shape."""
    x = torch.randn(tokens, columns)
    W, weight = torch.randn(rows, columns), torch.randn(rows, columns).bfloat16()
    total, E = torch.zeros(columns, columns), torch.randn(columns, rows)
    add_gram(total, x)
    H = mirror(total / tokens)
    factor = factorise(H)
    inputs = x.bfloat16()
    damped = H + factor.ridge * torch.eye(columns)
    primitives: dict[str, Callable[[], object]] = {
        "forward": lambda: torch.mm(inputs, weight.T),
        "gram": lambda: ssyrk(1.0, x.numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=1, lower=1),
        "cholesky": lambda: torch.linalg.cholesky_ex(damped),
        "sweep": lambda: left_looking_products(factor, E),
    }
    ours: dict[str, Callable[[], object]] = {
        "gram": lambda: add_gram(total, inputs.float()),
        "cholesky": lambda: factorise(H),
    }
    ours |= {name: lambda target=target: run_sweep(W, factor, *target) for name, target in TARGETS.items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="ROWSxCOLUMNS")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shape:
        rows, columns = map(int, shape.split("x"))
        results.append(measure(rows, columns, options.tokens, options.rounds))
        show(results[-1])
    RESULTS.parent.mkdir(exist_ok=True)
    summary = {"threads": options.threads, "tokens": options.tokens, "torch": torch.__version__, "shapes": results}
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
