"""Trains the bundled networks on scikit-learn's digits, in seconds, and writes them with the digits themselves.

    python scripts/train_digits.py            # resnet and mobilenet, into llmcompress/data
    python scripts/train_digits.py --check    # trains again and compares with what is bundled, byte for byte

Seeded and single-threaded: the same versions on the same kind of processor give the same bytes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llmcompress.resources import PACKAGE
from llmcompress.vision.images import digits
from llmcompress.vision.networks import build

ARGUMENTS: dict[str, dict[str, object]] = {
    "resnet": {"inputs": 1, "widths": [16, 32, 64], "blocks": 2, "classes": 10},
    "mobilenet": {"inputs": 1, "widths": [16, 24, 32], "blocks": 2, "classes": 10, "expansion": 4},
}
EPOCHS, BATCH, RATE = 30, 64, 4e-3


def write_digits() -> None:
    """The images as bytes: they have 17 levels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    folder = PACKAGE / "data" / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "images": torch.from_numpy(found.images).to(torch.uint8),
        "labels": torch.from_numpy(found.target).to(torch.uint8),
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "digits.safetensors")


def trained(name: str, arguments: dict[str, object], epochs: int = EPOCHS, seed: int = 0) -> tuple[nn.Module, float]:
    """A network and its accuracy on the held-out digits."""
    torch.manual_seed(seed)
    network, data = build(name, arguments), digits()
    x, y = data.train.pixels, data.train.labels
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(network(shifted(x[rows])), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        right = network(data.test.pixels).argmax(1) == data.test.labels
    return network, float(right.float().mean())


def shifted(x: Tensor) -> Tensor:
    """Each batch by up to one pixel."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return F.pad(x, (1, 1, 1, 1))[..., 1 + down : 9 + down, 1 + right : 9 + right]


def main() -> int:
    """Trains and writes, or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not check:
        write_digits()
    same = True
    for name in ARGUMENTS:
        began = time.perf_counter()
        network, accuracy = trained(name, ARGUMENTS[name])
        took = time.perf_counter() - began
        folder = PACKAGE / "data" / f"digits-{name}"
        state = {key: value.contiguous() for key, value in network.state_dict().items() if value.is_floating_point()}
        print(f"{name}: {sum(p.numel() for p in network.parameters())} weights, held-out {accuracy:.2%}, {took:.1f} s")
        if check:
            stored = load_file(folder / "model.safetensors")
            equal = all(torch.equal(stored[key], value) for key, value in state.items())
            print(f"  {'the bundled bytes' if equal else 'differs from what is bundled'}")
            same &= equal
            continue
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors")
        described = {
            "network": name,
            "arguments": ARGUMENTS[name],
            "data": "digits",
            "accuracy": accuracy,
            "epochs": EPOCHS,
        }
        Path(folder / "network.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
