"""Latency of a network before and after: float32, int8, channels removed, and both, in turns in one process.

    python scripts/bench_vision.py [--side 56] [--widths 32,64,128] [--threads 1]

The network is a residual one with random weights: latency does not depend on them."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from llmcompress.vision import compress_vision
from llmcompress.vision.int8 import to_int8
from llmcompress.vision.networks import resnet


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--widths", default="32,64,128")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = resnet(3, [int(w) for w in options.widths.split(",")]).eval()
    x = torch.rand(options.batch, 3, options.side, options.side)
    batches = [torch.rand(4, 3, options.side, options.side)]
    made = {
        "float32": compress_vision(dense, batches, "int8", overrides=["targets.include=[head]"]).module,
        "int8": to_int8(compress_vision(dense, batches, "int8").module),
        "channels": compress_vision(dense, batches, "channels").module,
        "channels + int8": to_int8(compress_vision(dense, batches, "channels-int8").module),
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for _ in range(options.rounds + 1):
            for name, module in made.items():
                began = time.perf_counter()
                module(x)
                times[name].append(time.perf_counter() - began)
    base = min(times["float32"][1:])
    for name, found in times.items():
        best, middle = min(found[1:]), statistics.median(found[1:])
        print(f"{name:<16} {1e3 * best:8.2f} ms (median {1e3 * middle:.2f}), {base / best:.2f} × float32")


if __name__ == "__main__":
    main()
