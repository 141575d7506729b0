"""The same model compressed again and again with slightly different recipes, each time from the first block that
changes, and judged each time on rows that the compression does not see.

What entered each block of the accepted compression is kept: of the calibration rows, on which the walk goes on from
there, and of the validation rows, which run through the finished blocks of a second model, read as they would be from
disk, and on to the head. A forward that goes on from a block is a forward of the whole model whose earlier blocks
return what they returned before, so that nothing here knows an architecture."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.evaluate.stream import LOGITS, rounded_activations
from llmcompress.lane import PROBE_TOKENS
from llmcompress.measure import spare_memory_bytes
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.recipe import Recipe
from llmcompress.suspend import Returns, SuspendedForward, gates
from llmcompress.walk import CompressedBlock, Walk

#: share of the spare memory that what enters the blocks may take
MEMORY_SHARE = 0.5
#: logits of the validation rows whose losses are taken at once
_LOSS_ROWS = 1024


@dataclass(frozen=True)
class Entry:
    """What the block before some block returned to each forward.

    Attributes:
        calibration: to the probe and the micro-batches of the calibration rows.
        validation: to the micro-batches of the validation rows.
    """

    calibration: Sequence[object]
    validation: Sequence[object]


@dataclass(frozen=True)
class Attempt:
    """One compression.

    Attributes:
        start: the block it began with.
        perplexity: per token, on the validation rows; infinite if it is not a number.
        entries: by number of the block.
    """

    start: int
    perplexity: float
    entries: dict[int, Entry]


class Recompression:
    """Compressions of one model.

    Args:
        model: dense, its blocks not loaded.
        tokens: (N, T) calibration rows.
        share: of the rows that are held back, to judge on.
        every: keep what enters every n-th block, where compressions can begin; None for as many as memory allows.
        replay: as `Walk` takes it.

    Attributes:
        held: numbers of the validation rows.
        runs: compressions made so far, of the whole model or of its end.
        blocks: compressions of single blocks so far.

    Raises:
        UserError: there are fewer than two rows.
    """

    def __init__(
        self, model: BlockwiseModel, tokens: Tensor, share: float, *, every: int | None = None, replay: bool = False
    ) -> None:
        self.model, self.judge, self.tokens, self.replay = model, model.twin(), tokens, replay
        self.every = every or affordable_interval(model, tokens.numel())
        self.held = held_back(len(tokens), share)
        judged_on = torch.zeros(len(tokens), dtype=torch.bool)
        judged_on[self.held] = True
        vocabulary = model.model.get_output_embeddings().weight.shape[0]
        self.calibration = tokens[~judged_on]
        self.validation = micro_batches(tokens[judged_on], limit=min(4096, LOGITS // vocabulary))
        self.runs = self.blocks = 0
        self._accepted: dict[int, Entry] = {}

    @property
    def rows(self) -> int:
        """Calibration and validation rows together."""
        return len(self.tokens)

    @property
    def number_of_blocks(self) -> int:
        """Of the model."""
        return len(self.model.blocks)

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept."""
        return kept_bytes(self.model, self.tokens.numel(), self.every)

    @property
    def mean_share(self) -> float:
        """Of the blocks, that a compression takes if all blocks are as likely to be the first that changes."""
        blocks = range(self.number_of_blocks)
        return sum(len(blocks) - k // self.every * self.every for k in blocks) / len(blocks) ** 2

    def identity(self) -> dict[str, Any]:
        """What the perplexities hang on, apart from the recipe; hashes of the whole model and of all rows."""
        return {
            "model": _hash_model(self.model),
            "calibration": hashlib.sha256(self.tokens.cpu().contiguous().numpy().tobytes()).hexdigest(),
            "arithmetic": f"torch {torch.__version__} {self.model.dtype} {self.model.device}",
        }

    @torch.no_grad()
    def attempt(self, recipe: Recipe, first: int = 0) -> Attempt:
        """Compresses with a recipe that differs from the accepted one in no block before ``first``."""
        start = max((index for index in self._accepted if index <= first), default=0)
        entry = self._accepted[start] if start else Entry((), ())
        self.runs += 1
        entries: dict[int, Entry] = {}
        walk = Walk(self.model, recipe, self.calibration, replay=self.replay)
        judged = [block.module for block in self.judge.blocks]
        walked = [block.module for block in self.model.blocks]
        with gates(judged), Returns(walked) as from_walk, Returns(judged) as from_judge:
            forwards = self._validation_forwards(start, entry.validation)
            for index, finished in enumerate(walk.run(start, [entry.calibration]), start):
                self.blocks += 1
                self._through(index, finished, forwards)
                following = index + 1
                if following < len(walked) and following % self.every == 0:
                    (lane,) = walk.lanes
                    entries[following] = Entry(from_walk.take(lane.everyone), from_judge.take(forwards))
        return Attempt(start, self._perplexity(forwards), entries)

    def accept(self, attempt: Attempt) -> None:
        """Later attempts begin from this one."""
        self._accepted |= attempt.entries

    def _validation_forwards(self, start: int, returned: Sequence[object]) -> list[SuspendedForward]:
        forwards = self.judge.start_forwards(self.validation, head=True)
        for forward, value in zip(forwards if start else (), returned, strict=True):
            forward.skip(start, value)
        return forwards

    def _through(self, index: int, finished: CompressedBlock, forwards: list[SuspendedForward]) -> None:
        """The validation rows go through a finished block, its inputs rounded as at run time; after the last one
        each leaves its loss as its result."""
        self.judge.fill_block(index, finished.tensors, finished.schemes)
        with rounded_activations(self.judge):
            for forward, tokens in zip(forwards, self.validation, strict=True):
                forward.resume()
                if forward.done:
                    forward.result = total_loss(forward.result, tokens)
        self.judge.release_block(index)

    def _perplexity(self, forwards: list[SuspendedForward]) -> float:
        positions = sum(tokens[:, 1:].numel() for tokens in self.validation)
        mean = sum(forward.result for forward in forwards) / positions
        return math.exp(mean) if mean < 700 else math.inf


def held_back(rows: int, share: float) -> list[int]:
    """Numbers of the validation rows, spread evenly over all of them.

    Raises:
        UserError: there are fewer than two rows.
    """
    if rows < 2:
        raise UserError("a search needs rows to calibrate on and rows to judge on", "--samples", "use at least 2")
    count = min(max(1, round(rows * share)), rows - 1)
    return [(2 * i + 1) * rows // (2 * count) for i in range(count)]


def affordable_interval(model: BlockwiseModel, tokens: int) -> int:
    """The least n for which what enters every n-th block fits into memory; the number of blocks if none does."""
    spare, blocks = spare_memory_bytes(model.device), len(model.blocks)
    fitting = (n for n in range(1, blocks) if spare is None or kept_bytes(model, tokens, n) <= MEMORY_SHARE * spare)
    return next(fitting, blocks)


def kept_bytes(model: BlockwiseModel, tokens: int, every: int = 1) -> int:
    """Memory of what is kept, of the accepted compression and of one that is being tried.

    Args:
        tokens: of the calibration and the validation rows together.
        every: as `Recompression` takes it.
    """
    hidden = model.model.config.get_text_config().hidden_size
    kept = len(range(every, len(model.blocks), every))
    return 2 * kept * (tokens + PROBE_TOKENS) * hidden * model.dtype.itemsize


def total_loss(logits: Tensor, tokens: Tensor) -> float:
    """−Σ log q(x_{t+1}) over the predicted positions of (B, T, V) logits and (B, T) tokens, in nats, float64."""
    lost = 0.0
    for row, ids in zip(logits, tokens.to(logits.device), strict=True):
        for predicted, following in zip(row[:-1].split(_LOSS_ROWS), ids[1:].split(_LOSS_ROWS), strict=True):
            losses = nn.functional.cross_entropy(predicted.float(), following, reduction="none")
            lost += float(losses.double().sum())
    return lost


def _hash_model(model: BlockwiseModel) -> str:
    """Of everything the model computes with."""
    digest = hashlib.sha256(json.dumps(model.checkpoint.config, sort_keys=True).encode())
    for name in sorted(model.checkpoint.tensors):
        value = model.checkpoint.read([name])[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
