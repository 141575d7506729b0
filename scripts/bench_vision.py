"""Convolutional networks: what int8, fewer channels and both gain in latency, and what half the latency costs.

    python scripts/bench_vision.py            # writes scripts/results/vision.json and vision.md, in a few minutes

- Layers: float32 and int8 convolutions of one shape, in turns.
- Networks: a residual network with random weights on larger images (latency does not depend on the weights).
- Half the latency: the bundled network, which is so small that calls rather than multiplications take its time, and one
  twice as wide that is trained first. HALP and the same share from every space (uniform), channels compared by the same
  importance (uniform by their norms too), recovered by the same training; the share is the one whose latency is nearest
  to HALP's.

Times are the least of many turns in one process, processor time of its one thread; accuracies are means over the seeds
of the recovery."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from train_digits import trained

from llmcompress.measure import versions
from llmcompress.vision import VisionOptions, VisionRecipe, compress_vision
from llmcompress.vision.fold import fold_norms
from llmcompress.vision.images import digits
from llmcompress.vision.int8 import to_int8
from llmcompress.vision.judge import accuracy, all_logits
from llmcompress.vision.latency import in_turns, machine
from llmcompress.vision.network import open_network
from llmcompress.vision.networks import resnet

RESULTS = Path(__file__).parent / "results"
#: channels, side of the image, images
LAYERS = [(32, 56, 1), (64, 28, 1), (128, 14, 1), (256, 14, 1), (64, 8, 64), (128, 4, 64)]
#: of the network that is trained here
WIDE: dict[str, object] = {"inputs": 1, "widths": [32, 64, 128], "blocks": 2, "classes": 10}
WIDE_EPOCHS, RECOVERY, SEEDS, STEPS = 8, 8, 6, 16
IMPORTANCE = "taylor_bn"
INT8 = {"stages": [{"quantize": {"method": "rtn", "weights": "int8", "activations": "int8-static-asym"}}]}


@torch.no_grad()
def least(calls: list[Callable[[], Any]], turns: int) -> list[float]:
    """Milliseconds of each call, the least of many turns."""
    return [1e3 * min(found) for found in in_turns(calls, turns)]


def folded(module: nn.Module, x: Tensor) -> nn.Module:
    """As it is used in float32."""
    module = copy.deepcopy(module)
    fold_norms(module, x[:4])
    return module


def rounded(module: nn.Module, batches: list[Tensor]) -> nn.Module:
    """In int8, computed in float32."""
    return compress_vision(module, batches, VisionRecipe.from_tree(INT8, "int8")).module


def layers(turns: int) -> list[dict[str, Any]]:
    """Float32 and int8 of single convolutions, 3 × 3."""
    calls, found = [], []
    for channels, side, images in LAYERS:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Flatten()).eval().requires_grad_(False)
        x = torch.rand(images, channels, side, side)
        integers = to_int8(rounded(net, [x[:2]]))[0]
        calls += [lambda conv=net[0], x=x: conv(x), lambda conv=integers, x=x: conv(x)]
        found.append({"channels": channels, "side": side, "images": images})
    times = least(calls, turns)
    return [
        entry | {"float32_ms": one, "int8_ms": other}
        for entry, one, other in zip(found, times[::2], times[1::2], strict=True)
    ]


def networks(turns: int) -> dict[str, float]:
    """Milliseconds of a network for larger images."""
    torch.manual_seed(0)
    dense = resnet(3, [32, 64, 128]).eval().requires_grad_(False)
    x, batches = torch.rand(1, 3, 56, 56), [torch.rand(4, 3, 56, 56)]
    smaller = compress_vision(dense, batches, "channels").module
    made = {
        "float32": folded(dense, batches[0]), "int8": to_int8(rounded(dense, batches)),
        "half of the channels": smaller, "both": to_int8(rounded(smaller, batches)),
    }  # fmt: skip
    return dict(zip(made, least([lambda m=m: m(x) for m in made.values()], turns), strict=True))


class HalfTheLatency:
    """HALP and uniform pruning of one network on the digits."""

    def __init__(self, name: str, dense: nn.Module, images: int, multiple: int, turns: int) -> None:
        self.name, self.dense, self.turns = name, dense, turns
        self.data = digits()
        self.calibration = self.data.calibration(512, 0)
        self.common = {"importance": IMPORTANCE, "multiple": multiple}
        self.half = {"budget": "latency", "ratio": 0.5, "images": images}
        self.x = self.data.train.pixels[torch.arange(images) % len(self.data.train)]
        self.reference = folded(dense, self.x)

    def pruned(self, options: dict[str, Any], table: Path, recovery: int = 0, seed: int = 0) -> tuple[nn.Module, Any]:
        """A smaller network, its norms folded, and its report."""
        recipe = VisionRecipe.from_tree({"channels": self.common | options}, self.name)
        found = compress_vision(
            self.dense, self.calibration.batches(), recipe, labels=self.calibration.labels, train=self.data.train,
            options=VisionOptions(seed=seed, recover_epochs=recovery, latency_table=table),
        )  # fmt: skip
        return found.module, found.report

    def right(self, module: nn.Module) -> float:
        """Share of the held-out digits named right."""
        found = accuracy(all_logits(module, self.data.test), self.data.test.labels)
        assert found is not None
        return found

    def run(self) -> dict[str, Any]:
        """Everything about this network."""
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "latency.json"
            halp, report = self.pruned(self.half, table)
            ratios = [step / STEPS for step in range(2, STEPS)]
            even = [self.pruned({"ratio": ratio, "importance": "random"}, table)[0] for ratio in ratios]
            calls = [self.reference, halp, *even]
            _, met, *times = least([lambda m=m: m(self.x) for m in calls], self.turns)
            nearest = min(range(len(even)), key=lambda n: abs(times[n] - met))
            kinds = {
                "halp": self.half,
                "uniform": {"ratio": ratios[nearest]},
                "uniform, l2": {"ratio": ratios[nearest], "importance": "l2"},
            }
            made: dict[str, Any] = {"float32": self.reference}
            right: dict[str, Any] = {"dense": self.right(self.dense)}
            for kind, options in kinds.items():
                for seed in range(SEEDS):
                    module, _ = self.pruned(options, table, RECOVERY, seed)
                    right.setdefault(kind, []).append(self.right(module))
                    if not seed:
                        made[kind] = module
        batches = self.calibration.batches()
        eight = {"int8": rounded(self.dense, batches), "halp + int8": rounded(made["halp"], batches)}
        right |= {kind: self.right(module) for kind, module in eight.items()}
        made |= {kind: to_int8(module) for kind, module in eight.items()}
        milliseconds = dict(zip(made, least([lambda m=m: m(self.x) for m in made.values()], self.turns), strict=True))
        return {
            "network": self.name, "images": len(self.x), "latency": report.latency, "uniform_ratio": ratios[nearest],
            "channels": {entry["name"]: [entry["before"], entry["after"]] for entry in report.channels},
            "milliseconds": milliseconds, "accuracy": right,
        }  # fmt: skip


def markdown(tree: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = ["# Convolutional networks", "", f"`{tree['command']}`: {json.dumps(tree['machine'])}, one thread.", ""]
    lines += ["| 3 × 3 convolution | float32, ms | int8, ms | float32 / int8 |", "| --- | --: | --: | --: |"]
    for e in tree["layers"]:
        shape = f"{e['channels']} → {e['channels']} channels, {e['images']} × {e['side']} × {e['side']}"
        one, other = e["float32_ms"], e["int8_ms"]
        lines.append(f"| {shape} | {one:.3f} | {other:.3f} | {one / other:.2f} |")
    lines += ["", "| residual network, widths 32, 64, 128, one image of 56 × 56 | ms | gain |", "| --- | --: | --: |"]
    base = tree["networks"]["float32"]
    lines += [f"| {name} | {ms:.2f} | {base / ms:.2f} × |" for name, ms in tree["networks"].items()]
    for e in tree["half_the_latency"]:
        lines += ["", f"| {e['network']}, {e['images']} images at once | ms | of float32 | accuracy after recovery |"]
        lines += ["| --- | --: | --: | --: |"]
        base, right = e["milliseconds"]["float32"], e["accuracy"]
        for name, ms in e["milliseconds"].items():
            found = right["dense" if name == "float32" else name]
            text = f"{found:.2%}" if isinstance(found, float) else f"{mean(found):.2%} (mean of {len(found)})"
            lines.append(f"| {name} | {ms:.2f} | {ms / base:.0%} | {text} |")
        said = e["latency"]
        lines += [
            "", f"HALP: {said['target']:.0%} of the latency asked for, {said['predicted']:.0%} predicted, "
            f"{said['measured']:.0%} measured; uniform takes {e['uniform_ratio']:.0%} of every space.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60, help="of what is compared (default: 60)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    wide, _ = trained("resnet", WIDE, WIDE_EPOCHS)
    wide.requires_grad_(False)
    halves = [
        HalfTheLatency("bundled network, widths 16, 32, 64", open_network("resnet").module, 256, 4, options.turns),
        HalfTheLatency("trained here, widths 32, 64, 128", wide, 64, 8, options.turns),
    ]
    tree = {
        "command": "python scripts/bench_vision.py", "machine": machine(), "versions": versions(), "seeds": SEEDS,
        "layers": layers(options.turns), "networks": networks(options.turns),
        "half_the_latency": [half.run() for half in halves],
    }  # fmt: skip
    tree["seconds"] = time.perf_counter() - began
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "vision.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    (options.output / "vision.md").write_text(markdown(tree), encoding="utf-8")
    print(markdown(tree), f"{tree['seconds']:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
