# python scripts/bench_salience.py [--out 4096 --in 4096 --tokens 2048 --threads 2]
"""Measures the exact activation-range salience against the direct ways, and against its definition in float64.

Direct ways, timed on a slice of input columns and scaled to all of them:
- recomputed: for every input column, the outputs without it (one product X Wᵀ each), their max and min over tokens;
- rank one: the outputs once, then for every input column Y − x wᵀ, its max and min over tokens.

Memory is what the exact way needs beside weights and rows, its result included (Linux). Writes
scripts/results/salience.json."""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.core.kernels import range_scan
from llmcompress.core.salience import CentredRows, range_excess
from llmcompress.core.stats import InputStats

#: input columns on which the direct ways are timed, and on which the result is compared with float64
RECOMPUTED, RANK_ONE, COMPARED = 4, 16, 32
ROUNDS = 3
RESULTS = Path(__file__).parent / "results" / "salience.json"


def inputs(kind: str, tokens: int, columns: int) -> Tensor:
    """(tokens, columns) float32 rows."""
    torch.manual_seed(0)
    x = torch.randn(tokens, columns)
    if kind == "outlier inputs":
        x[:, ::100] *= 30
    if kind == "heavy tails":
        x /= (torch.randn(3, tokens, columns).square().mean(0)).sqrt()  # Student's t, three degrees of freedom
    return x


def exact(weight: Tensor, x: Tensor) -> Tensor:
    """SS − range(Y_r) by the sorted-token scan."""
    stats = InputStats(x.shape[1], {"rows"})
    stats.update(x)
    return range_excess(weight, CentredRows(stats))


def swing(outputs: Tensor) -> Tensor:
    """max − min over the tokens of (tokens, out)."""
    return outputs.amax(0) - outputs.amin(0)


def recomputed(weight: Tensor, x: Tensor, columns: range) -> Tensor:
    """SS of some input columns, (out, columns): the outputs of the matrix without each of them."""
    found = []
    for i in columns:
        without = weight.clone()
        without[:, i] = 0
        found.append(swing(x @ without.T))
    return torch.stack(found, 1)


def rank_one(weight: Tensor, x: Tensor, columns: range) -> Tensor:
    """SS of some input columns, (out, columns): each column's share taken off the outputs."""
    y = x @ weight.T
    return torch.stack([swing(y - x[:, i, None] * weight[:, i]) for i in columns], 1)


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least of a few rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def extra_memory(work: Callable[[], object]) -> int | None:
    """Peak resident bytes during ``work`` beyond those before it; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def difference(weight: Tensor, x: Tensor, excess: Tensor) -> float:
    """Largest |found − float64 definition| on some columns, in units of the row's range."""
    columns = range(0, weight.shape[1], -(-weight.shape[1] // COMPARED))
    w, x = weight.double(), x.double()
    span = swing(x @ w.T)[:, None]
    return float(((excess[:, list(columns)] + span - rank_one(w, x, columns)).abs() / span).max())


def measure(kind: str, rows: int, columns: int, tokens: int) -> dict[str, object]:
    """All figures for one kind of inputs."""
    x = inputs(kind, tokens, columns)
    weight = torch.randn(rows, columns) / columns**0.5
    memory = extra_memory(lambda: exact(weight, x))
    ours, product = seconds(lambda: exact(weight, x)), seconds(lambda: x @ weight.T)
    direct = seconds(lambda: recomputed(weight, x, range(RECOMPUTED))) * columns / RECOMPUTED
    per_column = seconds(lambda: rank_one(weight, x, range(RANK_ONE))) - product
    updated = product + max(per_column, 0.0) * columns / RANK_ONE
    return {
        "inputs": kind,
        "exact_seconds": ours,
        "product_seconds": product,
        "direct_recomputed_seconds": direct,
        "direct_rank_one_seconds": updated,
        "times_recomputed": direct / ours,
        "times_rank_one": updated / ours,
        "max_difference_of_range": difference(weight, x, exact(weight, x)),
        "extra_memory_bytes": memory,
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", type=int, default=4096, dest="columns")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    range_scan.warm_up()
    print(f"{a.out} × {a.columns}, {a.tokens} tokens, {a.threads} threads; direct ways timed on {RECOMPUTED} and")
    print(
        f"{RANK_ONE} input columns and scaled; difference to float64 on {COMPARED} columns, in units of the row range\n"
    )
    print("| inputs | exact s | X Wᵀ alone s | recomputed s (×) | rank one s (×) | difference | extra MiB |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for kind in ("normal", "outlier inputs", "heavy tails"):
        r = measure(kind, a.out, a.columns, a.tokens)
        results.append(r)
        memory = "?" if r["extra_memory_bytes"] is None else f"{r['extra_memory_bytes'] / 2**20:.0f}"
        print(
            f"| {kind} | {r['exact_seconds']:.2f} | {r['product_seconds']:.2f} "
            f"| {r['direct_recomputed_seconds']:.0f} ({r['times_recomputed']:.0f}) "
            f"| {r['direct_rank_one_seconds']:.0f} ({r['times_rank_one']:.0f}) "
            f"| {r['max_difference_of_range']:.1e} | {memory} |",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    shape = {"out": a.out, "in": a.columns, "tokens": a.tokens, "threads": a.threads}
    how = {"columns_recomputed": RECOMPUTED, "columns_rank_one": RANK_ONE, "columns_compared": COMPARED}
    setting = {"torch": torch.__version__, "machine": platform.machine(), "rounds": ROUNDS}
    RESULTS.write_text(json.dumps({**shape, **how, **setting, "results": results}, indent=1) + "\n")
    print(f"\n{RESULTS}")


if __name__ == "__main__":
    main()
