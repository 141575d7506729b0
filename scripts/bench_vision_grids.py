"""What the grids, mixed precision and fitting after pruning are worth on the bundled networks, without training.

    python scripts/bench_vision_grids.py [--samples 512] [--models resnet mobilenet]

Accuracy is on the 500 held-out digits; the error is that of the logits, ‖after − before‖² / ‖before‖². Figures go to
``scripts/results/vision_grids.json``. The digits are easy: the error tells more than accuracy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llmcompress.measure import versions
from llmcompress.vision import compress_vision
from llmcompress.vision.images import digits
from llmcompress.vision.judge import accuracy, all_logits
from llmcompress.vision.network import open_network

RESULTS = Path(__file__).parent / "results" / "vision_grids.json"
#: row → recipe and its overrides
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("int8", ()),
    "int8, one scale per layer": ("int8-tensor", ("equalise=false",)),
    "int8, one scale per layer, equalised": ("int8-tensor", ()),
    "fp8": ("fp8", ()),
    "int4": ("int4", ()),
    "int4, nearest": ("int4", ("quantize.method=rtn",)),
    "int4, at random": ("int4", ("quantize.method=rtn", "quantize.weights=int4-mse-stochastic")),
    "power4": ("power4", ()),
    "log4": ("log4", ()),
    "codebook4": ("codebook4", ()),
    "mixed, 4 on average, output": ("mixed-int4", ()),
    "mixed, 4 on average, hessian": ("mixed-int4", ("mixed.sensitivity=hessian",)),
    "mixed, 4 on average, trace": ("mixed-int4", ("mixed.sensitivity=trace",)),
    "int3": ("int4", ("quantize.weights=int3-mse",)),
    "power3": ("power4", ("quantize.weights=power3",)),
    "log3": ("log4", ("quantize.weights=log3",)),
    "codebook3": ("codebook4", ("quantize.weights=codebook3",)),
    "mixed, 3 on average, output": ("mixed-int3", ("mixed.sensitivity=output",)),
    "mixed, 3 on average, hessian": ("mixed-int3", ("mixed.sensitivity=hessian",)),
    "mixed, 3 on average, trace": ("mixed-int3", ()),
    "magnitude 50 %": ("global-50", ()),
    "magnitude 50 %, fitted": ("magnitude-50-refit", ()),
    "wanda 50 %": ("wanda-50", ()),
    "sparsegpt 50 %": ("sparsegpt-50", ()),
}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=["resnet", "mobilenet"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = digits()
    images = data.calibration(options.samples, 0)
    found: dict[str, Any] = {"samples": options.samples, "held out": len(data.test), "versions": versions()}
    for model in options.models:
        dense = open_network(model).module
        before = all_logits(dense, data.test)
        rows: dict[str, Any] = {"dense": {"accuracy": accuracy(before, data.test.labels)}}
        print(f"{model}: dense {rows['dense']['accuracy']:.2%}")
        for row, (recipe, overrides) in ROWS.items():
            made = compress_vision(dense, images.batches(), recipe, overrides=overrides, labels=images.labels)
            after = all_logits(made.module, data.test)
            rows[row] = {
                "accuracy": accuracy(after, data.test.labels),
                "logit_error": float((after - before).square().sum() / before.square().sum()),
                "bits": made.report.effective_bits,
                "zeros": made.report.sparsity,
            }
            if layers := made.report.mixed.get("layers"):
                rows[row]["layers"] = {layer["name"]: layer["bits"] for layer in layers}
            figures = rows[row]
            print(
                f"  {row:<38} {figures['accuracy']:.2%}  error {figures['logit_error']:.2e}  "
                f"{figures['bits']:.2f} bits  {figures['zeros']:.0%} zeros", flush=True,
            )  # fmt: skip
        found[model] = rows
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
