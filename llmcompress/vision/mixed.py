"""Mixed precision: how many bits each layer's weights get, where a budget is to be spent where it matters.

    min Σ_l s_l(b_l)   over b_l in a few numbers of bits,   Σ_l n_l b_l ≤ budget

solved exactly as an integer program. A layer's sensitivity s_l(b) to weights of b bits, Q, is one of

| `output`  | ‖z(Q) − z‖² / ‖z‖² of the network's logits z, measured with this layer alone rounded                     |
| `hessian` | λ_max(H_l) ‖W − Q‖² (HAWQ: Dong et al., 2019, arXiv:1905.03696)                                          |
| `trace`   | tr(H_l) / n_l · ‖W − Q‖² (HAWQ-V2: Dong et al., 2020, arXiv:1911.03852; the program: arXiv:2011.10680)   |

with Q by rounding to nearest on the recipe's own grid, and H of `llmcompress.vision.curvature`. Matrices that read one
tensor the same way get the same number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array
from torch import Tensor, nn

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Method
from llmcompress.errors import UserError
from llmcompress.vision.curvature import Curvature
from llmcompress.vision.network import logits

#: calibration images that sensitivities are measured on
IMAGES = 128


@dataclass(frozen=True)
class MixedOptions:
    """Which bits, and how many of them together.

    Attributes:
        bits: candidates.
        average: bits of a weight's code, over all quantized weights.
        bytes: of all codes together, instead of an average; 0 for the average.
        sensitivity: see the table of the module.
    """

    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    average: float = 4.0
    bytes: int = 0
    sensitivity: Literal["output", "hessian", "trace"] = "output"

    def __post_init__(self) -> None:
        if not self.bits or any(not 2 <= b <= 8 for b in self.bits) or len(set(self.bits)) < len(self.bits):
            raise UserError(
                f"{list(self.bits)} are no candidates", "mixed.bits", "write some of 2 to 8, such as [2, 4]"
            )
        if self.bytes < 0 or (not self.bytes and self.average < min(self.bits)):
            raise UserError("less than the fewest bits everywhere", "mixed.average", f"use {min(self.bits)} or more")

    def most(self, weights: int) -> int:
        """Bits that the codes of so many weights may take together."""
        return 8 * self.bytes if self.bytes else int(self.average * weights + 1e-9)


def check_mixed(methods: Sequence[Method]) -> None:
    """Raises UserError if no step has a grid of several widths."""
    grids = [grid for m in methods if isinstance(grid := getattr(m, "weights", None), QuantGrid)]
    if not grids or any(grid.kind in ("fp8", "nvfp4", "mxfp4") or grid.values for grid in grids):
        raise UserError("no stage rounds weights to a grid of any width", "mixed", "add quantize: {weights: int4}")


def with_bits(methods: Sequence[Method], bits: int) -> tuple[Method, ...]:
    """The steps with other grids of the weights."""

    def changed(method: Any) -> Method:
        grid = getattr(method, "weights", None)
        return replace(method, weights=replace(grid, bits=bits)) if isinstance(grid, QuantGrid) else method

    return tuple(changed(method) for method in methods)


@dataclass
class Mixed:
    """What was decided.

    Attributes:
        methods: the steps of each layer, by name.
        told: for the report: the budget, what it came to, and by layer weights, bits and sensitivities.
    """

    methods: dict[str, tuple[Method, ...]]
    told: dict[str, Any]


def choose_bits(
    module: nn.Module,
    groups: Sequence[Sequence[str]],
    methods: Sequence[Method],
    options: MixedOptions,
    x: Tensor,
    seed: int,
) -> Mixed:
    """Bits for each layer of a network, which stays as it is.

    Args:
        module: in evaluation mode, norms folded.
        groups: names of the layers that are quantized, those that must have the same number together.
        methods: steps, the last grid of which is the one that is widened and narrowed.
        x: (N, C, H, W) calibration images; the first `IMAGES` are used.

    Raises:
        UserError: the budget is less than the fewest bits everywhere take.
    """
    grid = next(m.weights for m in reversed(methods) if isinstance(getattr(m, "weights", None), QuantGrid))  # type: ignore[attr-defined]
    names, bits = [name for group in groups for name in group], sorted(options.bits)
    found = sensitivities(module, names, [replace(grid, bits=b) for b in bits], options.sensitivity, x[:IMAGES], seed)
    weights = {name: module.get_submodule(name).get_parameter("weight").numel() for name in names}
    costs = torch.tensor([sum(weights[n] for n in group) for group in groups])[:, None] * torch.tensor(bits)
    losses = torch.stack([sum((found[n] for n in group), torch.zeros(len(bits))) for group in groups])
    most = options.most(sum(weights.values()))
    chosen = allocate(losses, costs, most)
    fixed = [k for k, b in enumerate(bits) if int(costs[:, k].sum()) <= most]
    told = {
        "sensitivity": options.sensitivity, "candidates": bits, "budget_bits": most,
        "used_bits": sum(int(costs[row, k]) for row, k in enumerate(chosen)),
        "total": sum(float(losses[row, k]) for row, k in enumerate(chosen)),
        "uniform": {"bits": bits[fixed[-1]], "total": float(losses[:, fixed[-1]].sum())},
        "layers": [
            {"name": n, "weights": weights[n], "bits": bits[k], "sensitivities": found[n].tolist()}
            for group, k in zip(groups, chosen, strict=True) for n in group
        ],
    }  # fmt: skip
    return Mixed({n: with_bits(methods, bits[k]) for group, k in zip(groups, chosen, strict=True) for n in group}, told)


@torch.no_grad()
def sensitivities(
    module: nn.Module, names: Sequence[str], grids: Sequence[QuantGrid], kind: str, x: Tensor, seed: int
) -> dict[str, Tensor]:
    """(grids,) float64 of each layer, by the formulas of the module."""
    layers = {name: module.get_submodule(name) for name in names}
    if kind == "output":
        return {name: _output_errors(module, layer, grids, x) for name, layer in layers.items()}
    curvature = Curvature(module, names, x)
    scales = curvature.top_eigenvalues(seed) if kind == "hessian" else curvature.traces(seed)
    found = {}
    for (name, layer), scale in zip(layers.items(), scales, strict=True):
        weight = layer.get_parameter("weight")
        moved = [float((rounded(layer, grid) - weight).double().square().sum()) for grid in grids]
        share = weight.numel() if kind == "trace" else 1
        found[name] = torch.tensor(moved, dtype=torch.float64) * max(scale, 0.0) / share
    return found


def _output_errors(module: nn.Module, layer: nn.Module, grids: Sequence[QuantGrid], x: Tensor) -> Tensor:
    weight, before = layer.get_parameter("weight"), logits(module, x).double()
    kept, errors = weight.detach().clone(), []
    try:
        for grid in grids:
            weight.data.copy_(rounded(layer, grid))
            errors.append(float((logits(module, x).double() - before).square().sum() / before.square().sum()))
            weight.data.copy_(kept)
    finally:
        weight.data.copy_(kept)
    return torch.tensor(errors, dtype=torch.float64)


def rounded(layer: nn.Module, grid: QuantGrid) -> Tensor:
    """A layer's weight to nearest on a grid; a scale per tensor is one for each group of a convolution."""
    weight = layer.get_parameter("weight").detach()
    parts = weight.flatten(1).chunk(layer.groups if isinstance(layer, nn.Conv2d) and grid.group == "tensor" else 1)
    return torch.cat([grid.round(part, grid.fit(part)) for part in parts]).view_as(weight)


def allocate(losses: Tensor, costs: Tensor, most: int) -> list[int]:
    """The choice of each row with the least sum of losses at a sum of costs of at most ``most``.

    Args:
        losses: (rows, choices), not negative.
        costs: (rows, choices) whole numbers.

    Raises:
        UserError: the cheapest choices cost more.
    """
    least = int(costs.amin(1).sum())
    if least > most:
        raise UserError(f"{most} bits are less than {least}, the fewest", "mixed", "allow more, or add smaller bits")
    rows, choices = losses.shape
    gain = losses.double().numpy().ravel()
    one_each = csr_array(block_diag([np.ones((1, choices))] * rows))
    found = milp(
        gain / max(float(gain.max()), 1e-300),
        integrality=np.ones(rows * choices),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.double().numpy().reshape(1, -1) / most, -np.inf, 1),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UserError(f"the allocation was not solved ({found.message})", "mixed", "use fewer candidates")
    return [int(row.argmax()) for row in found.x.reshape(rows, choices)]
