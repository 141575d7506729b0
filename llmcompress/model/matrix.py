"""One view of every layer that multiplies by a matrix: weights as (out, in), whatever the module stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_matrix(module: nn.Module) -> bool:
    """Whether `MatrixView` can read the module."""
    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True)
class MatrixView:
    """A module's weight as (out, in).

    Attributes:
        name: dotted name in the model.
        module: ``nn.Linear``, or GPT-2's ``Conv1D``, which stores (in, out).
    """

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module stores (in, out)."""
        return isinstance(self.module, Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.get_parameter("weight").shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """A float32 copy, (out, in)."""
        weight = self.module.get_parameter("weight").detach()
        return (weight.T if self.transposed else weight).to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Replaces the values by ``weight`` (out, in), in the module's dtype."""
        parameter = self.module.get_parameter("weight")
        parameter.data.copy_(weight.T if self.transposed else weight)

    def as_stored(self, weight: Tensor) -> Tensor:
        """``weight`` (out, in) in the module's layout."""
        return weight.T.contiguous() if self.transposed else weight
