"""BatchNorm folding: a norm that reads a convolution and nothing else does becomes part of it.

    w' = w · γ / √(σ² + ε),   b' = (b − μ) · γ / √(σ² + ε) + β

Which norm reads which convolution is seen in a forward, not guessed from names; each fold is accepted only if the
network's outputs stay what they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.vision.network import logits

#: relative change of the logits that rounding in float32 may cause
TOLERANCE = 1e-4
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Folded:
    """What was folded.

    Attributes:
        pairs: (matrix, norm) names.
        refused: names of norms that stay, with the reason.
        error: ‖after − before‖ / ‖before‖ of the logits.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    error: float = 0.0


@torch.no_grad()
def fold_norms(module: nn.Module, x: Tensor) -> Folded:
    """Folds every BatchNorm that can be, in place; the norms become ``nn.Identity``.

    Args:
        module: in evaluation mode.
        x: (N, C, H, W) a few images on which each fold is verified.
    """
    before = logits(module, x)
    scale = before.norm().clamp(min=1e-30)
    names = {layer: name for name, layer in module.named_modules()}
    found = Folded()
    for norm, writer in _pairs(module, x).items():
        name = names[norm]
        if writer is None:
            found.refused[name] = "no convolution or Linear alone writes its input"
            continue
        undo = _fold(module, writer, name, norm)
        if float((logits(module, x) - before).norm() / scale) > TOLERANCE:
            undo()
            found.refused[name] = f"something else reads the output of {names[writer]} too"
            continue
        found.pairs.append((names[writer], name))
    found.error = float((logits(module, x) - before).norm() / scale)
    return found


def _pairs(module: nn.Module, x: Tensor) -> dict[nn.Module, nn.Module | None]:
    """Norm → the matrix whose output it reads, None if it is none's, or one that is called several times."""
    outputs: dict[int, nn.Module] = {}
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module | None] = {}
    alive: list[Tensor] = []

    def wrote(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        if isinstance(output, Tensor):
            alive.append(output)
            outputs[id(output)] = layer

    def reads(layer: nn.Module, args: tuple[Any, ...]) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        pairs[layer] = outputs.get(id(args[0]))

    hooks = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(wrote))
        elif isinstance(layer, _NORMS) and layer.running_var is not None:
            hooks.append(layer.register_forward_pre_hook(reads))
    try:
        logits(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: writer if writer and calls[writer] == calls[norm] == 1 else None for norm, writer in pairs.items()}


def _fold(module: nn.Module, writer: Any, name: str, norm: nn.Module) -> Any:
    """Moves the norm into its writer; returns what takes it back."""
    assert isinstance(norm, _NORMS) and norm.running_var is not None and norm.running_mean is not None
    weight, bias = writer.get_parameter("weight"), writer.bias
    had = (weight.detach().clone(), None if bias is None else bias.detach().clone())
    gain = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    shift = norm.running_mean if bias is None else norm.running_mean - bias
    offset = (0.0 if norm.bias is None else norm.bias) - shift * gain
    weight.data.mul_(gain.view(-1, *[1] * (weight.dim() - 1)))
    writer.bias = nn.Parameter(offset.detach().clone(), requires_grad=False)
    replace_module(module, name, nn.Identity())

    def undo() -> None:
        weight.data.copy_(had[0])
        writer.bias = None if had[1] is None else nn.Parameter(had[1], requires_grad=False)
        replace_module(module, name, norm)

    return undo


def replace_module(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts ``layer`` where the submodule of this dotted name is."""
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, layer)


def remove_folded(module: nn.Module, names: list[str]) -> None:
    """Makes the norms of these names what folding left of them."""
    for name in names:
        replace_module(module, name, nn.Identity())
