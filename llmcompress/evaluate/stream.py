"""Two models over the same tokens, block by block in lockstep, so that neither is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.evaluate.divergence import Comparison, Divergence
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.suspend import gates

#: logits of one micro-batch and model held at a time
LOGITS = 2**28


@torch.no_grad()
def compare(
    dense: BlockwiseModel, compressed: BlockwiseModel, tokens: Tensor, on_block: Callable[[int], None] = lambda i: None
) -> Divergence:
    """Perplexity of both models, and the divergence of the second from the first, on (N, T) token rows.

    Inputs of quantized matrices are rounded as a run time would round them.
    """
    vocabulary = dense.model.get_output_embeddings().weight.shape[0]
    batches = micro_batches(tokens, limit=min(4096, LOGITS // vocabulary))
    comparison = Comparison()
    with gates([b.module for b in dense.blocks]), gates([b.module for b in compressed.blocks]):
        lanes = [(model, model.start_forwards(batches, head=True)) for model in (dense, compressed)]
        last = len(dense.blocks) - 1
        for index in range(last):
            for model, forwards in lanes:
                model.load_block(index)
                with rounded_activations(model):
                    for forward in forwards:
                        forward.resume()
                model.release_block(index)
            on_block(index)
        for model, _ in lanes:
            model.load_block(last)
        for number, batch in enumerate(batches):
            logits = []
            for model, forwards in lanes:
                with rounded_activations(model):
                    forwards[number].resume()
                logits.append(forwards[number].result)
                forwards[number].result = None
            comparison.update(logits[0], logits[1], batch.to(logits[0].device))
        for model, _ in lanes:
            model.release_block(last)
    return comparison.result()


@torch.no_grad()
def streamed_logits(
    model: BlockwiseModel, batches: Sequence[Tensor], advance: Callable[[int], None] = lambda steps: None
) -> Iterator[Tensor]:
    """Logits (B, T, V) of every (B, T) batch in turn, with one block in memory at a time and the last one at the end.

    Inputs of quantized matrices are rounded as a run time would round them. Two such iterators may be read in turns.
    ``advance`` is told 1 whenever a batch has gone through a block.
    """
    last = len(model.blocks) - 1
    with gates([block.module for block in model.blocks]), rounded_activations(model):
        forwards = model.start_forwards(list(batches), head=True)
        for index in range(last):
            model.load_block(index)
            for forward in forwards:
                forward.resume()
                advance(1)
            model.release_block(index)
        model.load_block(last)
        for forward in forwards:
            forward.resume()
            advance(1)
            logits, forward.result = forward.result, None
            yield logits
        model.release_block(last)


@contextmanager
def rounded_activations(model: BlockwiseModel) -> Iterator[None]:
    """While open, inputs and outputs of quantized matrices are rounded to the grids they have."""
    hooks = []
    for name, scheme in model.schemes.items():
        module = model.model.get_submodule(name)
        if scheme.activations is not None:
            hooks.append(module.register_forward_pre_hook(_rounder(model, name)))
        if scheme.outputs is not None:
            hooks.append(module.register_forward_hook(_output_rounder(scheme.outputs)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounder(model: BlockwiseModel, name: str) -> Callable[..., Any]:
    grid = model.schemes[name].activations
    assert grid is not None

    def rounded(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (grid.round_activations(args[0], model.input_levels.get(name)), *args[1:])

    return rounded


def _output_rounder(grid: QuantGrid) -> Callable[..., Tensor]:
    def rounded(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return grid.round_activations(output)

    return rounded
