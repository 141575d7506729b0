"""What a model loses if one of its blocks is compressed, for every block in one pass over the model.

The dense model and those with one compressed block go through the blocks side by side, one block in memory at a time:
L²/2 times the validation rows through a block for L blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcompress.evaluate.divergence import Comparison
from llmcompress.evaluate.stream import LOGITS
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.recipe import Recipe
from llmcompress.recompress import held_back
from llmcompress.rehearsal import spans
from llmcompress.suspend import Returns, SuspendedForward, gates
from llmcompress.walk import CompressedBlock, Walk


class Sensitivity:
    """What a model loses if one of its blocks is compressed.

    Args:
        model: dense, its blocks not loaded.
        tokens: (N, T) rows.
        share: of the rows that judges; the others calibrate.
        replay: as `Walk` takes it.

    Attributes:
        rows: of both.
        held: numbers of those that judge.

    Raises:
        UserError: there are fewer than two rows.
    """

    def __init__(self, model: BlockwiseModel, tokens: Tensor, share: float, replay: bool = False) -> None:
        self.model, self.judge, self._replay = model, model.twin(), replay
        self.rows, self.held = len(tokens), held_back(len(tokens), share)
        judges = torch.zeros(len(tokens), dtype=torch.bool)
        judges[self.held] = True
        vocabulary = model.model.get_output_embeddings().weight.shape[0]
        self.calibration = tokens[~judges]
        self.validation = micro_batches(tokens[judges], limit=min(4096, LOGITS // vocabulary))

    @property
    def number_of_blocks(self) -> int:
        """Of the model."""
        return len(self.model.blocks)

    def shares(self, recipe: Recipe) -> list[float]:
        """Of the weights that the recipe compresses, block by block."""
        return [last - first for first, last in spans(self.model, recipe.sparing(self.model.routers).targets)]

    @torch.no_grad()
    def costs(self, recipe: Recipe, advance: Callable[[int], None] = lambda steps: None) -> list[float]:
        """KL(dense ‖ model with this block alone compressed) of every block, nats per token.

        Args:
            recipe: its tokens go on through the dense model.
            advance: told 1 for every block.
        """
        judge, last = self.judge, len(self.model.blocks) - 1
        blocks = [block.module for block in judge.blocks]
        alone: list[list[SuspendedForward]] = []
        with gates(blocks), Returns(blocks, copied=False) as returned:
            dense = judge.start_forwards(self.validation, head=True)
            entered: list[Any] = [None] * len(dense)
            for index, finished in enumerate(Walk(self.model, recipe, self.calibration, replay=self._replay).run()):
                alone.append(judge.start_forwards(self.validation, head=True))
                if index:
                    for forward, value in zip(alone[-1], entered, strict=True):
                        forward.skip(index, value)
                if index < last:
                    judge.load_block(index)
                    _resume(dense, *alone[:-1])
                    judge.fill_block(index, finished.tensors, finished.schemes)
                    _resume(alone[-1])
                    entered = returned.take(dense)
                    for forwards in alone:  # nobody asks for theirs, and they are large
                        returned.take(forwards)
                else:
                    costs = self._judged(finished, dense, alone)
                judge.release_block(index)
                advance(1)
        return costs

    def _judged(
        self, finished: CompressedBlock, dense: list[SuspendedForward], alone: list[list[SuspendedForward]]
    ) -> list[float]:
        """Through the last block and the head, the logits of one micro-batch and two models at a time."""
        judge, last = self.judge, len(alone) - 1
        comparisons = [Comparison() for _ in alone]
        for batch, tokens in enumerate(self.validation):
            judge.load_block(last)
            logits = _logits(dense[batch])
            for number, forwards in enumerate(alone):
                if number == last:
                    judge.fill_block(last, finished.tensors, finished.schemes)
                comparisons[number].update(logits, _logits(forwards[batch]), tokens.to(logits.device))
        return [comparison.result().kl_divergence for comparison in comparisons]


def _resume(*models: list[SuspendedForward]) -> None:
    for forwards in models:
        for forward in forwards:
            forward.resume()


def _logits(forward: SuspendedForward) -> Tensor:
    """Of a forward that waits at the last block; it keeps them no longer."""
    forward.resume()
    logits, forward.result = forward.result, None
    return logits
