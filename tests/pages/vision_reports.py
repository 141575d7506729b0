"""A report on images that is made up, with everything that its page may show."""

from __future__ import annotations

import random

from llmcompress.report import MatrixReport
from llmcompress.vision.report import VisionReport


def example(layers: int = 12, name: str = "resnet", removed: bool = True) -> VisionReport:
    """The same every time; the third layer is a convolution of two groups."""
    drawn = random.Random(layers)
    report = VisionReport(
        name, "channels-int8", seed=5, versions={"torch": "2.13.0"}, seconds=12.5,
        data={"source": "digits", "calibration": 512, "held out": 500}, accuracy={"before": 0.986, "after": 0.972},
        agreement=0.966, logit_error=0.01, parameters={"before": 174_970, "after": 43_946},
        size_bytes={"before": 704_484, "after": 46_060}, macs={"before": 1_648_256, "after": 414_528},
        seconds_by_phase={"compress": 8.25, "train": 1.5}, peak_memory_bytes=600 << 20,
        fold={"pairs": 14, "refused": {"norm": "something else reads it"}, "error": 3e-7}, output="somewhere",
        warnings=[f"stages.{i}.depthwise.0: left dense" for i in range(3)],
        exports=[{"file": "network.onnx", "bytes": 170_792, "difference": 3e-3, "tolerance": 0.02,
                  "holds": "INT8 weights in 16 layers"}],
        trainings=[
            {"what": "while masks grew", "epochs": 3, "images": 1297, "learn": "both", "rate": 2e-3,
             "loss": [0.5, 0.25, 0.125], "sparsity": [0.2, 0.4]},
        ],
    )  # fmt: skip
    if removed:
        report.channels = [
            {"name": f"stages.{i}.first.0", "layers": [f"stages.{i}.first.0"], "before": 16 * (i + 1), "after": 8}
            for i in range(layers)
        ]
        report.removal_error = 1e-6
        report.latency = {
            "images": 64, "dense_seconds": 0.004, "target": 0.5, "predicted": 0.48, "measured": 0.52, "least": 0.2,
        }  # fmt: skip
    for number in range(layers):
        for part in ("[0]", "[1]") if number == 2 else ("",):
            shape, error = (16 << part.count("["), 144), 10 ** -(1 + 3 * drawn.random())
            matrix = MatrixReport(f"stages.{number}.first.0{part}", shape, drawn.random(), 8.0625, error)
            report.matrices.append(matrix)
    return report
