"""The calibration tokens on their way through one model, and the rows that are taken from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcompress.block_pass import BlockPass, Stop
from llmcompress.distributed import ALONE, Team
from llmcompress.errors import UserError
from llmcompress.model.groups import InputGroup
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.suspend import SuspendedForward

#: values of a micro-batch's hidden states, and its tokens: enough for full-speed matrix products, and no more, since a
#: block keeps several times as much while it goes through
BATCH_VALUES, BATCH_TOKENS = 1 << 20, (512, 2048)
#: rows on which the error of a matrix is measured
ERROR_ROWS = 256
#: tokens of the probe that finds input groups and verifies folds
PROBE_TOKENS = 16


class Lane:
    """All micro-batches on their way through one model.

    Args:
        model: its blocks are loaded one at a time.
        tokens: (N, T) int64; no rows if other processes have them all.
        batch: rows per micro-batch; None for as few as run at full speed.
        kind: what makes the forwards.
        probe: (1, T) tokens of the first forward; None for the beginning of the first row.

    Attributes:
        everyone: the probe and the micro-batches.
    """

    def __init__(
        self, model: BlockwiseModel, tokens: Tensor, batch: int | None = None,
        kind: Callable[[Callable[[], Any]], SuspendedForward] = SuspendedForward, probe: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        batches = () if not len(tokens) else _micro_batches(model, tokens) if batch is None else tokens.split(batch)
        probe = beginning(tokens) if probe is None else probe
        self.everyone = model.start_forwards([probe, *batches], kind=kind)
        self.probe, *self.forwards = self.everyone

    def through(
        self, index: int, groups: list[InputGroup], replay: bool, ahead: bool = False, team: Team = ALONE
    ) -> BlockPass:
        """The way through a loaded block, with a stop at each of the groups, which may be another model's, and where
        forwards of others in the team wait.

        In the last block it ends at the last of them.
        """
        modules = self.model.model
        stops = [
            Stop(
                [modules.get_submodule(m.name) for m in group.matrices],
                modules.get_submodule(group.fold_name) if group.fold else None,
            )
            for group in groups
        ]
        block = self.model.blocks[index].module
        return BlockPass(block, stops, self.forwards, replay, ahead, index == len(self.model.blocks) - 1, team.earliest)


def beginning(tokens: Tensor) -> Tensor:
    """(1, T) tokens of the probe: of the first row, or any where there is none."""
    return tokens[:1, :PROBE_TOKENS] if len(tokens) else torch.arange(min(PROBE_TOKENS, tokens.shape[1]))[None]


def _micro_batches(model: BlockwiseModel, tokens: Tensor) -> list[Tensor]:
    fewest, most = BATCH_TOKENS
    hidden = model.model.config.get_text_config().hidden_size
    return micro_batches(tokens, limit=min(max(BATCH_VALUES // hidden, fewest), most))


def sample(rows: list[Tensor]) -> Tensor:
    """At most ERROR_ROWS rows, evenly spread over all of them, (tokens, in), copied."""
    stride = max(1, sum(len(x) for x in rows) // ERROR_ROWS)
    return torch.cat([x[::stride] for x in rows])[:ERROR_ROWS]


def require_finite(name: str, rows: list[Tensor]) -> None:
    """Raises UserError naming the group if one of its rows holds a NaN or an infinity."""
    for x in rows:
        if x.numel() and not all(math.isfinite(extreme) for extreme in x.aminmax()):
            raise UserError("NaN or infinite activations reach it", name, "try --dtype float32, or check the weights")
