"""What the recipes, grids and ways of training are worth on the bundled networks.

    python scripts/table_vision.py [--samples 512] [--models resnet mobilenet]

Accuracy is on the 500 held-out digits, of which one is 0.2 points; the error is that of the logits,
‖after − before‖² / ‖before‖². Rows that train name their epochs; all others only calibrate. The digits are easy: the
error tells more than accuracy. Writes ``scripts/results/vision_table.json`` and ``vision_table.md``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.measure import versions
from llmcompress.vision import VisionOptions, VisionRecipe, compress_vision
from llmcompress.vision.images import ImageSet, digits
from llmcompress.vision.judge import accuracy, all_logits
from llmcompress.vision.network import open_network

RESULTS = Path(__file__).parent / "results"
#: of the trainings that a recipe leaves to the user
EPOCHS = 8
#: row → recipe and its overrides
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("int8", ()),
    "int4, int8 inputs": ("int4-int8", ()),
    "sparsegpt 50 % + int8, one sweep": ("joint", ()),
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
    "sparsegpt 2:4": ("sparsegpt-2of4", ()),
    "half of the channels": ("channels", ()),
    "half of the channels, ThiNet": ("thinet", ()),
    "half of the channels, LASSO": ("lasso", ()),
}
#: those that train
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "int4, int8 inputs, through the rounding": ("qat-int4", ()),
    "80 % while training": ("gradual-80", ()),
    "80 % in rounds": ("iterative-80", ()),
    "half of the channels, recovered": ("channels", ()),
    "half of the channels, soft": ("soft-filters", ()),
}
HEADER = "| {} | accuracy | logit error | bits | zeros | multiplications |\n| --- | --: | --: | --: | --: | --: |\n"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=["resnet", "mobilenet"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = digits()
    found: dict[str, Any] = {"samples": options.samples, "held out": len(data.test), "versions": versions()}
    pages = []
    for model in options.models:
        print(model)
        dense = open_network(model).module
        before = all_logits(dense, data.test)
        figures = {"accuracy": accuracy(before, data.test.labels), "logit_error": 0.0, "bits": 32.0, "zeros": 0.0}
        found[model] = rows = {"dense": figures}
        lines = [line("dense", figures)]
        for row, (recipe, overrides) in {**ROWS, **TRAINED}.items():
            rows[row] = measured(dense, data, before, recipe, overrides, options.samples, row in TRAINED)
            lines.append(line(row, rows[row]))
            print(lines[-1], flush=True)
        pages.append(HEADER.format(model) + "\n".join(lines) + "\n")
        (RESULTS / "vision_table.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        (RESULTS / "vision_table.md").write_text("\n".join(pages))


def measured(
    dense: nn.Module,
    data: ImageSet,
    before: Tensor,
    recipe: str,
    overrides: tuple[str, ...],
    samples: int,
    trains: bool,
) -> dict[str, Any]:
    """One row: the recipe on the network, judged on the held-out digits."""
    images = data.calibration(samples, 0)
    given = VisionOptions(recover_epochs=EPOCHS if trains and not VisionRecipe.load(recipe).tune else 0)
    made = compress_vision(
        dense, images.batches(), recipe, overrides=overrides, labels=images.labels, train=data.train, options=given
    )
    after, report = all_logits(made.module, data.test), made.report
    figures: dict[str, Any] = {
        "accuracy": accuracy(after, data.test.labels),
        "logit_error": float((after - before).square().sum() / before.square().sum()),
        "bits": report.effective_bits,
        "zeros": report.sparsity,
        "epochs": sum(training["epochs"] for training in report.trainings),
        "multiplications": report.macs,
    }
    if layers := report.mixed.get("layers"):
        figures["layers"] = {layer["name"]: layer["bits"] for layer in layers}
    return figures


def line(row: str, figures: dict[str, Any]) -> str:
    """Of the Markdown table."""
    epochs, macs = figures.get("epochs"), figures.get("multiplications")
    cells = [
        f"{row}, {epochs} epochs" if epochs else row,
        f"{figures['accuracy']:.1%}",
        f"{figures['logit_error']:.1e}",
        "–" if figures["bits"] is None else f"{figures['bits']:.2f}",
        "–" if figures["zeros"] is None else f"{figures['zeros']:.0%}",
        f"{macs['after'] / macs['before']:.0%}" if macs else "100%",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
