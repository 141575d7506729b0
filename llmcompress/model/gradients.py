"""Gradients of the language-model loss with one block in memory.

Forwards run once through all blocks and leave what enters each of them; then the blocks are taken from the last to the
first, each run again on what entered it and differentiated there. A block and its gradients are all that is held beside
the embeddings, the head, and the entering hidden states: sequences · tokens · hidden size numbers per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmcompress.errors import UserError
from llmcompress.model.groups import Call, run_block
from llmcompress.model.load import Block, BlockwiseModel
from llmcompress.suspend import SuspendedForward, gates


@dataclass
class Gradient:
    """Of one parameter, in its own shape, float32.

    Attributes:
        mean: over the sequences.
        squares: mean of the squared gradients of the sequences; None if they are not wanted.
    """

    mean: Tensor
    squares: Tensor | None


def block_gradients(
    model: BlockwiseModel,
    rows: Tensor,
    parameters: list[str],
    squares: bool = False,
    advance: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[int, Block, dict[str, Gradient]]]:
    """Gradients of the mean cross-entropy of the next token, block by block from the last to the first.

    Args:
        model: its blocks not loaded.
        rows: (N, T) token ids; the loss is the mean over them of each one's mean over its T − 1 predictions.
        parameters: dotted names within a block of those wanted, the same in every block.
        squares: whether squared gradients are wanted too.
        advance: called with 1 after each of 2 · blocks steps.

    Yields:
        (number, the loaded block, gradients by name within it). The block is released afterwards.

    Raises:
        UserError: the blocks are not called one after the other on one hidden state.
    """
    last = len(model.blocks) - 1
    rows = rows.clone()  # samples of the model are inference tensors, which take no part in gradients
    calls: list[list[Call]] = []
    with gates([block.module for block in model.blocks]):
        with torch.no_grad():
            forwards = model.start_forwards(list(rows.split(1)), head=True)
            for index in range(last):
                calls.append([_own_call(forward) for forward in forwards])
                model.load_block(index)
                for forward in forwards:
                    forward.resume()
                model.release_block(index)
                advance(1)
        block = model.load_block(last)
        wanted = _require_gradients(block, parameters)
        entering, gathered = [], _Sums(wanted, squares)
        for forward, row in zip(forwards, rows, strict=True):
            entering.append(_hidden(forward.call).requires_grad_(True))
            loss = _finish(forward, row.to(model.device))
            entering[-1] = gathered.add(torch.autograd.grad(loss / len(rows), [entering[-1], *wanted.values()]))
            forward.result = None
    model.release_embeddings()
    advance(2)
    yield last, block, gathered.result(len(rows))
    model.release_block(last)
    for index in reversed(range(last)):
        block = model.load_block(index)
        wanted = _require_gradients(block, parameters)
        gathered = _Sums(wanted, squares)
        for number, (args, kwargs) in enumerate(calls.pop()):
            hidden = args[0].requires_grad_(True)
            with torch.enable_grad():
                output = run_block(block.module, ((hidden, *args[1:]), kwargs))
            found = torch.autograd.grad(output, [hidden, *wanted.values()], entering[number].view_as(output))
            entering[number] = gathered.add(found)
        advance(1)
        yield index, block, gathered.result(len(rows))
        model.release_block(index)


class _Sums:
    """Gradients added up over sequences."""

    def __init__(self, wanted: dict[str, Tensor], squares: bool) -> None:
        self._names = list(wanted)
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in wanted.items()}
        self._squares = {name: torch.zeros_like(s) for name, s in self._sums.items()} if squares else {}

    def add(self, found: tuple[Tensor, ...]) -> Tensor:
        """Takes (gradient of the entering hidden state, gradients of the parameters); returns the first."""
        for name, gradient in zip(self._names, found[1:], strict=True):
            self._sums[name] += gradient
            if self._squares:
                self._squares[name] += gradient.float().square()
        return found[0]

    def result(self, sequences: int) -> dict[str, Gradient]:
        """Each sequence's loss was divided by their number, which its squared gradient must not be."""
        return {
            name: Gradient(total, self._squares[name] * sequences if self._squares else None)
            for name, total in self._sums.items()
        }


def _finish(forward: SuspendedForward, row: Tensor) -> Tensor:
    """Runs the last block and the head; the loss of the row."""
    with torch.enable_grad():
        forward.resume()
        if not forward.done:
            raise UserError("its forward goes on after its last block", "model", "structured pruning is not supported")
        logits = forward.result[0, :-1].float()
        return F.cross_entropy(logits, row[1:])


def _own_call(forward: SuspendedForward) -> Call:
    args, kwargs = forward.call
    return (_hidden((args, kwargs)).clone(), *args[1:]), kwargs


def _hidden(call: Call) -> Tensor:
    """The hidden state that a block is called with."""
    if not call[0] or not isinstance(call[0][0], Tensor):
        raise UserError("its blocks do not take a hidden state first", "model", "structured pruning is not supported")
    return call[0][0]


def _require_gradients(block: Block, parameters: list[str]) -> dict[str, Tensor]:
    return {name: block.module.get_parameter(name).requires_grad_(True) for name in parameters}
