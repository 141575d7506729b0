"""Scales with which a server keeps keys and values in FP8: ``kv_cache: fp8`` in a recipe.

One scale for all keys of a layer and one for all its values, absmax / 448 over the calibration rows, keys with their
positions encoded, as a cache holds them. They are taken from the dense model, whose keys and values those of the
compressed one are meant to be, and stored as compressed-tensors wants them: ``k_scale`` and ``v_scale`` of a module."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import Tensor, nn

from llmcompress.core.floats import float_scale
from llmcompress.errors import UserError
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.suspend import gates


class _Ranges:
    """Stands where an attention module expects its cache: keeps nothing of what it is given but the largest value."""

    def __init__(self) -> None:
        self.largest = torch.zeros(2)

    def update(self, keys: Tensor, values: Tensor, *given: object, **named: object) -> tuple[Tensor, Tensor]:
        """As a transformers Cache's; any further arguments are about places in a real one."""
        found = torch.stack([keys.abs().amax().float(), values.abs().amax().float()]).cpu()
        self.largest = torch.maximum(self.largest, found)
        return keys, values

    def hook(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Of an attention module, before its forward."""
        return given, named | {"past_key_values": self}


@torch.no_grad()
def key_value_scales(model: BlockwiseModel, tokens: Tensor) -> dict[str, Tensor]:
    """``….k_scale`` and ``….v_scale`` (1,) of every attention module, in the checkpoint's dtype.

    Args:
        model: dense; its blocks are read one by one.
        tokens: (N, T) ids.

    Raises:
        UserError: the library knows no attention module in the model, or one was never called with a cache.
    """
    found = {name: _Ranges() for name, module in model.model.named_modules() if is_cached_attention_module(module)}
    if not found:
        raise UserError("compressed-tensors knows no attention module in it", type(model.model).__name__,
                        "leave kv_cache out of the recipe")  # fmt: skip
    hooks = [
        model.model.get_submodule(name).register_forward_pre_hook(ranges.hook, with_kwargs=True)
        for name, ranges in found.items()
    ]
    try:
        _run(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = model.checkpoint.dtype
    scales: dict[str, Tensor] = {}
    for name, ranges in found.items():
        if not ranges.largest.any():
            raise UserError("its forward takes no cache", name, "leave kv_cache out of the recipe")
        both, _ = float_scale("fp8", ranges.largest[:, None], dtype, None)
        scales |= {f"{name}.{kind}_scale": both[row].to(dtype) for row, kind in enumerate("kv")}
    return scales


def _run(model: BlockwiseModel, tokens: Tensor) -> None:
    """One forward of all tokens, block by block."""
    with gates([block.module for block in model.blocks]):
        forwards = model.start_forwards(micro_batches(tokens))
        for index in range(len(model.blocks)):
            model.load_block(index)
            for forward in forwards:
                forward.resume()
            model.release_block(index)
