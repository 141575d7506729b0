"""Which channels leave together: this package beside torch-pruning (Fang et al., 2023, arXiv:2301.12900), on the
networks of the tests. Needs the extra ``bench``.

    python scripts/compare_torch_pruning.py            # writes scripts/results/torch_pruning.json

A group is a set of (layer, ``in`` or ``out``, channel). torch-pruning is asked for the group of every output channel of
every convolution and Linear but those that write the logits. Where groups differ, removing one of torch-pruning's is
compared with zeroing what it would remove, as every removal of this package is."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from llmcompress.vision.channels import TOLERANCE
from llmcompress.vision.graph import FROZEN, channel_graph
from llmcompress.vision.network import logits

ROOT = Path(__file__).parents[1]
Group = frozenset[tuple[str, str, int]]


def twelve() -> ModuleType:
    """The networks of the tests."""
    spec = importlib.util.spec_from_file_location("vision_nets", ROOT / "tests" / "vision" / "nets.py")
    assert spec is not None and spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    return nets


def own_groups(module: nn.Module, x: Tensor) -> tuple[set[Group], set[str]]:
    """Groups of this package, and the layers that write logits or what cannot go."""
    graph = channel_graph(module, x)
    free, found, frozen = graph.removable(), dict[int, set[tuple[str, str, int]]](), set[str]()
    for use in graph.uses:
        owner, _, attribute = use.name.rpartition(".")
        name = owner if attribute in ("weight", "bias", "running_mean", "running_var") else use.name
        for channel, unit in enumerate(use.labels.tolist()):
            if unit in free:
                found.setdefault(unit, set()).add((name, "in" if use.role == "reads" else "out", channel))
            elif unit == FROZEN and use.role == "writes":
                frozen.add(name)
    return set(map(frozenset, found.values())), frozen


class Peer:
    """torch-pruning on one network."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = copy.deepcopy(module).requires_grad_(True), x
        self.graph = torch_pruning.DependencyGraph().build_dependency(
            self.module, x, output_transform=lambda out: getattr(out, "logits", out)
        )
        self.names = {id(layer): name for name, layer in self.module.named_modules()}
        self.names |= {id(p): name for name, p in self.module.named_parameters()}

    def pruned(self, name: str, channel: int) -> Any:
        """torch-pruning's own object for the group of an output channel."""
        layer = self.module.get_submodule(name)
        return self.graph.get_pruning_group(
            layer,
            torch_pruning.prune_conv_out_channels
            if isinstance(layer, nn.Conv2d)
            else torch_pruning.prune_linear_out_channels,
            [channel],
        )

    def group(self, name: str, channel: int) -> Group:
        """The group of an output channel."""
        entries = set()
        for dependency, channels in self.pruned(name, channel):
            layer = dependency.target.module
            if id(layer) not in self.names:
                continue  # an operation without weights
            mixes = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
            side = "in" if mixes and self.graph.is_in_channel_pruning_fn(dependency.handler) else "out"
            grouped = isinstance(layer, nn.Conv2d) and 1 < layer.groups < len(layer.weight)
            if grouped and self.graph.is_in_channel_pruning_fn(dependency.handler):
                continue  # which outputs go says it
            entries |= {(self.names[id(layer)], side, int(c)) for c in channels}
        return frozenset(entries)

    def differs_from_zeroing(self, name: str, channel: int) -> float | str:
        """Relative difference of the logits of the network without a group and of the one where nothing reads it."""
        state = copy.deepcopy(self.module).requires_grad_(False)
        for layer, side, c in self.group(name, channel):
            if side == "in":
                state.get_parameter(f"{layer}.weight").data.index_fill_(1, torch.tensor([c]), 0.0)
        other = Peer(self.module, self.x)
        try:
            other.pruned(name, channel).prune()
            with torch.no_grad():
                meant, found = logits(state, self.x), logits(other.module, self.x)
        except Exception as error:  # the smaller network may fail in any way
            return f"does not run: {str(error).strip().splitlines()[0][:80]}"
        return float((found - meant).norm() / meant.norm())


def compared(kind: str, nets: ModuleType) -> dict[str, Any]:
    """One network."""
    module, x = nets.network(kind), nets.images(kind)
    own, frozen = own_groups(module, x)
    try:
        peer = Peer(module, x)
    except Exception as error:  # a tracer may fail in any way
        return {"groups": len(own), "peer cannot trace": str(error)[:120]}
    head = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]
    other: dict[Group, tuple[str, int]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != head:
            for channel in range(layer.weight.shape[0]):
                other.setdefault(peer.group(name, channel), (name, channel))
    result: dict[str, Any] = {
        "groups": len(own), "same": len(own & other.keys()), "only here": len(own - other.keys()),
        "only torch-pruning": len(other.keys() - own),
    }  # fmt: skip
    examples: dict[str, int] = {}
    for group, (name, channel) in other.items():
        if group not in own:
            examples.setdefault(name, channel)
    result["differences"] = [
        {
            "layer": name,
            "torch-pruning": sorted({f"{layer} {side}" for layer, side, _ in peer.group(name, channel)}),
            "here": "frozen" if name in frozen else sorted(
                {f"{layer} {side}" for group in own if (name, "out", channel) in group for layer, side, _ in group}
            ),
            "removing torch-pruning's group against zeroing it": peer.differs_from_zeroing(name, channel),
        }
        for name, channel in examples.items()
    ]  # fmt: skip
    return result


def main() -> None:
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "results" / "torch_pruning.json")
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    nets = twelve()
    found = {}
    for kind in nets.KINDS:
        found[kind] = entry = compared(kind, nets)
        print(kind, {key: value for key, value in entry.items() if key != "differences"})
        for difference in entry.get("differences", []):
            print("   ", difference)
    tree = {
        "command": "python scripts/compare_torch_pruning.py", "torch": str(torch.__version__),
        "torch-pruning": importlib.metadata.version("torch-pruning"), "tolerance": TOLERANCE, "networks": found,
    }  # fmt: skip
    output.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
