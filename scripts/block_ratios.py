"""Sparsity by measured sensitivity: which ratio each decoder block should have, at the same mean, so that the model
loses least.

    python scripts/block_ratios.py --model llama --calibration book.txt [--sparsity 0.5]

Each block is pruned alone by SparseGPT, to a ratio below the sparsity and to one above it, and the KL divergence of the
whole model from the dense one is taken on rows of the text that calibrate nothing. Between them log KL is straight in
the ratio, KL_b(r) ≈ exp(c_b + k_b r), and what blocks cost adds up while it is small; so Σ KL_b is least where one more
zero costs the same in every block: k_b exp(c_b + k_b r_b) equal for all. Prints what to give to a recipe, as in

    python -m llmcompress --model llama --recipe jsq-plus --set prune.ramp=0 --set 'prune.ratios=[0.35, …]'

Blocks are taken to have the same number of weights."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from llmcompress.api import Options, compress
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.locate import locate
from llmcompress.recipe import Recipe

#: how far from the sparsity blocks are pruned to be measured, and how far their ratios may go
STEP, LIMIT = 0.1, 0.2
#: share of the text that calibrates
CALIBRATES = 0.8


def measured_ratios(model: str, text: Path, sparsity: float, samples: int) -> list[float]:
    """One ratio per block; their mean is ``sparsity``."""
    checkpoint = Checkpoint(locate(model))
    blocks = [block.name for block in BlockwiseModel(checkpoint, checkpoint.dtype).blocks]
    tried = (sparsity - STEP, sparsity + STEP)
    with tempfile.TemporaryDirectory() as scratch:
        options = _options(text, Path(scratch), samples)
        cost = np.array([[_alone(model, name, r, options, Path(scratch)) for r in tried] for name in blocks])
    for name, (low, high) in zip(blocks, cost, strict=True):
        print(f"{name}: KL {low:.5f} at {tried[0]:g}, {high:.5f} at {tried[1]:g}", flush=True)
    return allocate(np.log(cost), tried, sparsity)


def allocate(log_cost: np.ndarray, tried: tuple[float, float], sparsity: float) -> list[float]:
    """The ratios within ``LIMIT`` of the sparsity at which a further zero costs the same in every block.

    Args:
        log_cost: (blocks, 2) of the two ratios that were tried.
    """
    slope = np.maximum(np.diff(log_cost)[:, 0] / (tried[1] - tried[0]), 1e-3)
    start = log_cost[:, 0] - slope * tried[0]

    def ratios(log_price: float) -> np.ndarray:
        return np.clip((log_price - np.log(slope) - start) / slope, sparsity - LIMIT, sparsity + LIMIT)

    ends = np.log(slope) + start
    low, high = float((ends + slope * (sparsity - LIMIT)).min()), float((ends + slope * (sparsity + LIMIT)).max())
    price = brentq(lambda p: float(ratios(p).mean()) - sparsity, low, high)
    return [float(r) for r in ratios(price)]


def _options(text: Path, scratch: Path, samples: int) -> Options:
    """The text in two parts: rows to calibrate on, and rows to judge by."""
    whole = text.read_text(encoding="utf-8")
    cut = int(len(whole) * CALIBRATES)
    parts = {"calibration": whole[:cut], "judged": whole[cut:]}
    for name, part in parts.items():
        (scratch / f"{name}.txt").write_text(part, encoding="utf-8")
    found = {name: str(scratch / f"{name}.txt") for name in parts}
    return Options(calibration=found["calibration"], samples=samples, eval_text=found["judged"])


def _alone(model: str, block: str, ratio: float, options: Options, scratch: Path) -> float:
    """KL divergence of the model in which one block is pruned."""
    stage = {"prune": {"method": "sparsegpt", "sparsity": ratio}}
    recipe = Recipe.from_tree({"stages": [stage], "targets": {"include": [f"{block}.*"]}}, "block-ratios")
    found = compress(model, recipe, scratch / "out", options, force=True).kl_divergence
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE.txt")
    parser.add_argument("--sparsity", type=float, default=0.5, help="their mean (default: 0.5)")
    parser.add_argument("--samples", type=int, default=32, help="rows to calibrate on (default: 32)")
    args = parser.parse_args()
    if not LIMIT <= args.sparsity < 1 - LIMIT:
        parser.error(f"--sparsity {args.sparsity:g}: give one from {LIMIT:g} to {1 - LIMIT:g}")
    ratios = measured_ratios(args.model, args.calibration, args.sparsity, args.samples)
    print(f"--set prune.ramp=0 --set 'prune.ratios=[{', '.join(f'{r:.4f}' for r in ratios)}]'")


if __name__ == "__main__":
    main()
