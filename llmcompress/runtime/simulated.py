"""Quantized Linears that no kernel executes: dense weights, inputs and outputs rounded as the folder says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.core.grid import Levels
from llmcompress.export.quantized import Scheme


def simulate(linear: nn.Linear, scheme: Scheme, levels: Levels | None) -> None:
    """Makes ``linear``, whose weight already holds the rounded values, round its input and its output.

    Args:
        linear: changed by hooks; its weight stays dense.
        scheme: what to round.
        levels: of a static input grid.
    """
    inputs, outputs = scheme.activations, scheme.outputs
    if inputs is not None:

        def round_input(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
            return (inputs.round_activations(given[0], levels),)

        linear.register_forward_pre_hook(round_input)
    if outputs is not None:

        @torch.no_grad()
        def round_output(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            return outputs.round_activations(output)

        linear.register_forward_hook(round_output)
