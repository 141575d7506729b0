"""Predicts seconds and memory of a compression from the sizes of a model and measured rates.

    python scripts/scale_model.py [--samples 128] [--length 2048]     # the table
    python scripts/scale_model.py --check     # against the runs in results/limit.json and streaming.json

How it counts is written in scale_model.md, with the table. Rates of this machine's processors come from the primitives
that bench_limit.py measured; those of GPUs are assumptions, named as such, until somebody measures them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
#: interpreter, libraries and what the allocator keeps
BASE_BYTES = 0.75 * GIB


@dataclass(frozen=True)
class Matrix:
    """Equal matrices of one block.

    Attributes:
        rows, columns: of each.
        number: how many there are.
        inputs: how many distinct tensors they read: Gram matrices and factorisations.
        share: of the tokens, that reach each of them: an expert's.
    """

    rows: int
    columns: int
    number: int = 1
    inputs: float = 1
    share: float = 1.0


@dataclass(frozen=True)
class Model:
    """Equal blocks, and what lies outside them."""

    blocks: int
    hidden: int
    matrices: tuple[Matrix, ...]
    vocab: int

    @property
    def block_weights(self) -> int:
        """Of one block."""
        return sum(m.number * m.rows * m.columns for m in self.matrices)

    @property
    def weights(self) -> int:
        """Of the model."""
        return self.blocks * self.block_weights + 2 * self.vocab * self.hidden


def llama(blocks: int, hidden: int, inner: int, shared: int, vocab: int) -> Model:
    """Queries and output, keys and values, gate and up, down."""
    return Model(blocks, hidden, (
        Matrix(hidden, hidden, 2, 2), Matrix(shared, hidden, 2, 0), Matrix(inner, hidden, 2, 1), Matrix(hidden, inner),
    ), vocab)  # fmt: skip


#: DeepSeek-V3: latent attention, and in all blocks but three 256 experts of which 8 see a token, and one that sees all
EXPERTS = Model(61, 7168, (
    Matrix(1536, 7168, 1, 1), Matrix(24576, 1536), Matrix(576, 7168, 1, 0), Matrix(32768, 512), Matrix(7168, 16384),
    Matrix(2048, 7168, 2, 1), Matrix(7168, 2048),
    Matrix(2048, 7168, 512, 256, 8 / 256), Matrix(7168, 2048, 256, 256, 8 / 256),
), 129280)  # fmt: skip

MODELS = {
    "tinyllama-block": llama(2, 2048, 5632, 256, 32000),
    "llama-7b-block": llama(1, 4096, 11008, 4096, 32000),
    "llama-7b": llama(32, 4096, 11008, 4096, 32000),
    "70B": llama(80, 8192, 28672, 1024, 128256),
    "405B": llama(126, 16384, 53248, 1024, 128256),
    "671B experts": EXPERTS,
}


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of one process.

    Attributes:
        forward, gram, cholesky, sweep: operations; the sweep with its kernel, not its products alone.
        disk: bytes read or written by all processes together.
        link: bytes between processes; 0 where there is but one.
    """

    forward: float
    gram: float
    cholesky: float
    sweep: float
    disk: float
    link: float = 0.0


#: a guess at one GPU of the H100's kind; nothing of it was measured here
ASSUMED_GPU = Rates(forward=4e14, gram=4e13, cholesky=5e12, sweep=1e13, disk=2e9, link=1e11)


def measured_rates() -> Rates:
    """Of two processor threads, from the shape in results/limit.json that is nearest to most work: 4096 × 11008."""
    shape = json.loads((RESULTS / "limit.json").read_text(encoding="utf-8"))["shapes"][-1]
    flops, seconds = shape["flops"], shape["seconds"]
    solve = flops["cholesky"] / seconds["cholesky"]
    return Rates(
        flops["forward"] / shape["limit_seconds"]["forward"], flops["gram"] / seconds["gram"], solve,
        flops["sweep"] / seconds["sparsegpt 2:4"], disk=4e8,
    )  # fmt: skip


def seconds(model: Model, tokens: int, rates: Rates, processes: int = 1) -> dict[str, float]:
    """Of a whole run that prunes by SparseGPT 2:4, by part. A block's rows go through its matrices once."""
    part = dict.fromkeys(("forward", "gram", "cholesky", "sweep", "link", "disk"), 0.0)
    for m in model.matrices:
        reached = tokens * m.share
        part["forward"] += 2 * reached * m.number * m.rows * m.columns / rates.forward / processes
        part["gram"] += reached * m.inputs * m.columns**2 / rates.gram / processes
        part["cholesky"] += m.inputs * m.columns**3 / 3 / rates.cholesky  # every process factors
        part["sweep"] += m.number * m.rows * m.columns**2 / rates.sweep / processes
        if processes > 1:
            moved = (
                8 * m.inputs * m.columns**2 + 5 * m.number * m.rows * m.columns
            )  # sums there and back; values, masks
            part["link"] += moved * (processes - 1) / processes / rates.link
    part = {name: value * model.blocks for name, value in part.items()}
    part["disk"] = 3 * 2 * model.weights / rates.disk  # hashed, read, written in two bytes each
    return part


def memory_bytes(model: Model, tokens: int, processes: int = 1) -> float:
    """High-water mark of one process: the block as it is computed with, the one before as it waits to be written, the
    input group with most float32 copies and sums, and the rows in flight."""
    group = max(8 * min(m.number, 2) * m.rows * m.columns + 4 * m.columns**2 for m in model.matrices)
    widest = max(m.columns for m in model.matrices)
    live = tokens / processes * 2 * (3 * model.hidden + 2 * widest)
    waiting = 2 * model.block_weights if model.blocks > 1 else 0
    return BASE_BYTES + 2 * model.block_weights + waiting + group + live


def check() -> None:
    """Prediction beside the runs of results/limit.json and results/streaming.json."""
    rates = measured_rates()
    runs = [(b["preset"], b["tokens"], b["seconds"], b["peak_memory_bytes"]) for b in
            json.loads((RESULTS / "limit.json").read_text(encoding="utf-8"))["blocks"]]  # fmt: skip
    for name, run in json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8")).items():
        if name == "llama-7b sparsegpt-2of4":
            runs.append(("llama-7b", run["rows"][0] * run["rows"][1], run["seconds"], run["peak_memory_bytes"]))
    for name, tokens, took, peak in runs:
        found = seconds(MODELS[name], tokens, rates)
        blocks = sum(found.values()) - found["disk"] * (name != "llama-7b")
        memory = memory_bytes(MODELS[name], tokens) / GIB
        print(f"{name}, {tokens} tokens: {blocks:.0f} s predicted, {took:.0f} s measured; "
              f"{memory:.1f} GiB predicted, {peak / GIB:.1f} GiB measured")  # fmt: skip


def table(tokens: int) -> None:
    """Every model on two threads, and on one to eight GPUs of the assumed rates."""
    print(f"SparseGPT 2:4, {tokens} calibration tokens\n")
    print("| model | weights | on | hours | most of it | GiB per process |\n|---|---|---|---|---|---|")
    for name, model in MODELS.items():
        if name.endswith("-block"):
            continue
        for on, rates, processes in [("2 threads, measured rates", measured_rates(), 1)] + [
            (f"{n} GPU{'s' * (n > 1)}, assumed rates", ASSUMED_GPU, n) for n in (1, 2, 4, 8)
        ]:
            parts = seconds(model, tokens, rates, processes)
            first = max(parts, key=lambda part: parts[part])
            share = parts[first] / sum(parts.values())
            print(f"| {name} | {model.weights / 1e9:.0f} G | {on} | {sum(parts.values()) / 3600:.2f} | "
                  f"{first} {share:.0%} | {memory_bytes(model, tokens, processes) / GIB:.0f} |")  # fmt: skip


def main() -> None:
    """Prints the table, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        check()
    else:
        table(options.samples * options.length)


if __name__ == "__main__":
    main()
