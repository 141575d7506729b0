"""A block as a method may see it whole: what it would return with other matrices and other inputs to them.

For methods that learn on a block's output. The network stays unknown to them: `BlockView` is a protocol, and the walk
brings what fulfils it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockGroup:
    """The matrices of a block that read one tensor, as the block has them now.

    Attributes:
        name: that of the `MatrixGroup` that will be served.
        weights: (out, in) float32 by matrix name; those to be compressed.
        bystanders: (out, in) float32 of the tensor's other readers.
        folds: whether its inputs can be divided by a scale at their source.
        rounds_inputs: False where nothing rounds the inputs at run time, whatever a recipe asks for.
    """

    name: str
    weights: dict[str, Tensor]
    bystanders: list[Tensor] = field(default_factory=list)
    folds: bool = False
    rounds_inputs: bool = True


class BlockView(Protocol):
    """A block with the calibration inputs that wait in front of it.

    Attributes:
        index: of the block; the model's first is 0.
        span: shares of all blocks' weights to be compressed that lie before the block, and up to its end.
        batches: number of micro-batches that wait.
        scale_dtype: dtype in which quantization scales will be stored.
    """

    index: int
    span: tuple[float, float]
    batches: int
    scale_dtype: torch.dtype

    @property
    def groups(self) -> list[BlockGroup]:
        """In calling order."""
        ...

    def run(
        self, batch: int, weights: Mapping[str, Tensor] | None = None, inputs: Mapping[str, Transform] | None = None
    ) -> Tensor:
        """The block's output (..., features) float32 for a waiting micro-batch; gradients flow if they are enabled.

        Args:
            batch: its number.
            weights: (out, in) by matrix name, in place of the dense ones.
            inputs: by group name, what becomes of the tensor (..., in) on its way into the group's matrices.
        """
        ...

    def aim(self, batch: int) -> Tensor:
        """What the dense block returns for the micro-batch, (..., features) float32; for the dense model's own inputs
        where the walk has them."""
        ...

    def note(self, text: str) -> None:
        """Shows how far the work on the block is."""
        ...
