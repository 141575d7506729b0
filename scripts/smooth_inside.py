"""A copy of a Llama checkpoint that computes the same, smoothed where SmoothQuant has no norm to fold into: inputs of
o_proj are divided channel by channel in the rows of v_proj, those of down_proj in the rows of up_proj.

What `ablate_jsq_plus.py` tries in front of a recipe. Scales are SmoothQuant's, s = max|x|^α / max|w|^(1 − α); the query
heads that share a key-value head share the scales of its channels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@torch.no_grad()
def smooth_inside(folder: str | Path, tokens: Tensor, target: Path, alpha: float) -> None:
    """Writes the copy, in float32, to ``target``.

    Args:
        folder: a local checkpoint.
        tokens: (N, T) rows on which the largest inputs are taken.
        alpha: share of the difficulty that goes to the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    absmax: dict[nn.Module, Tensor] = {}

    def watch(linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        largest = given[0].abs().flatten(0, -2).amax(0)
        absmax[linear] = torch.maximum(absmax.get(linear, largest), largest)

    layers = model.model.layers
    watched = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [linear.register_forward_pre_hook(watch) for linear in watched]
    for row in tokens.split(4):
        model(row)
    for hook in hooks:
        hook.remove()
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    width = layers[0].self_attn.head_dim
    for layer in layers:
        _divide(layer.mlp.up_proj, layer.mlp.down_proj, absmax[layer.mlp.down_proj], alpha)
        o = layer.self_attn.o_proj
        _divide(layer.self_attn.v_proj, o, absmax[o], alpha, shared, width)
    model.save_pretrained(target)


def _divide(
    source: nn.Linear, reader: nn.Linear, absmax: Tensor, alpha: float, shared: int = 1, width: int = 1
) -> None:
    """Moves scales from the rows of ``source`` to the columns of ``reader``, ``shared`` heads of ``width`` at once."""

    def of_source(columns: Tensor) -> Tensor:
        return columns.view(-1, shared, width).amax(1).flatten()

    x, w = of_source(absmax), of_source(reader.weight.abs().amax(0))
    s = (x.pow(alpha) / w.pow(1 - alpha)).nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-5)
    s[(x == 0) | (w == 0)] = 1.0
    source.weight /= s[:, None]
    if source.bias is not None:
        source.bias /= s
    reader.weight *= s.view(-1, 1, width).expand(-1, shared, width).flatten()
