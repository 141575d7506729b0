"""The only file that names architectures: modules with stacked experts that do not say how they are laid out.

Each entry has a test that fails without it (`tests/model/test_experts.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Undeclared:
    """How one class keeps and runs its experts.

    Attributes:
        class_name: in transformers.
        stacks: fields of each `Stack`.
        forward: of the module once its experts are matrices.
    """

    class_name: str
    stacks: tuple[tuple[Any, ...], ...]
    forward: Callable[..., Tensor]

    def fits(self, module: nn.Module) -> bool:
        """Whether the module is one of these."""
        return type(module).__name__ == self.class_name


def _called(module: nn.Module, number: int, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor | None:
    """One expert on its rows (tokens, in); None if it has none."""
    expert = module.get_submodule(str(number))
    if len(x):
        return run(expert, x)
    if module.visits_all:
        run(expert, x.new_zeros(1, x.shape[1]))
    return None


def _llama4(self: nn.Module, hidden: Tensor) -> Tensor:
    """Every expert gets all tokens (experts · tokens, in), those that it was not chosen for as zeros."""

    def run(expert: Any, x: Tensor) -> Tensor:
        return expert["down_proj"](expert["up_proj"](x) * self.act_fn(expert["gate_proj"](x)))  # type: ignore[operator]

    per_expert = hidden.view(int(self.num_experts), -1, hidden.shape[-1])  # type: ignore[arg-type]
    output = torch.zeros_like(per_expert)
    for number, rows in enumerate(per_expert):
        token = rows.any(-1).nonzero()[:, 0]
        result = _called(self, number, rows[token], run)
        if result is not None:
            output[number, token] = result
    return output.view_as(hidden)


def _dbrx(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    def run(expert: Any, x: Tensor) -> Tensor:
        gated = self.mlp.activation_fn(expert["w1"](x)) * expert["v1"](x)  # type: ignore[operator, union-attr]
        return expert["w2"](gated)

    rows = hidden.reshape(-1, hidden.shape[-1])
    output = torch.zeros_like(rows)
    for number in range(int(self.num_experts)):  # type: ignore[arg-type]
        token, place = (index == number).nonzero(as_tuple=True)
        result = _called(self, number, rows[token], run)
        if result is not None:
            output.index_add_(0, token, result * weights[token, place, None])
    return output.view(len(hidden), -1, hidden.shape[-1])


def _jetmoe(self: nn.Module, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Rows come sorted by expert."""
    parts = []
    for number, x in enumerate(inputs.split(expert_size)):
        result = _called(self, number, x, lambda expert, x: expert(x))
        if result is not None:
            parts.append(result)
    return torch.cat(parts)


UNDECLARED = (
    Undeclared(
        "Llama4TextExperts",
        (("gate_up_proj", ("gate_proj", "up_proj"), "", True), ("down_proj", ("down_proj",), "", True)),
        _llama4,
    ),
    Undeclared(
        "DbrxExperts",
        (
            ("mlp.w1", ("w1",), "", False, False, True),
            ("mlp.v1", ("v1",), "", False, False, True),
            ("mlp.w2", ("w2",), "", True, False, True),
        ),
        _dbrx,
    ),
    Undeclared("JetMoeParallelExperts", (("weight", ("",)),), _jetmoe),
)
