"""The walk of a run that may be killed: each finished block is written, and what is needed to go on is kept."""

from __future__ import annotations

from collections.abc import Iterator

from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.measure import Phases
from llmcompress.resume import KeptBlock, Workplace
from llmcompress.suspend import Returns
from llmcompress.walk import CompressedBlock, Walk


class Keeper:
    """Writes the blocks of one walk.

    Args:
        walk: not begun yet.
        writer: of the result.
        work: where it is kept how far the walk is.
        phases: where the time went.
    """

    def __init__(self, walk: Walk, writer: CheckpointWriter, work: Workplace, phases: Phases) -> None:
        self.walk, self.writer, self.work, self.phases = walk, writer, work, phases
        self._told = 0  # warnings of the walk that belong to finished blocks
        self._keeps = True

    def blocks(self, kept: list[KeptBlock]) -> Iterator[KeptBlock]:
        """Compresses the blocks that are not kept from an earlier process, and yields each once it is written."""
        walk, start = self.walk, len(kept)
        number = len(walk.model.blocks)
        if kept:
            walk.progress.say(f"goes on after block {start} of {number}, as {self.work.folder.name} says")
            walk.progress.skip_blocks(start)
            self.phases.add_earlier(kept[-1].phases, kept[-1].seconds)
            walk.warnings = [warning for block in kept for warning in block.warnings]
            self._told = len(walk.warnings)
        if start == number:
            return
        returned = self.work.returned(start, len(walk.models), walk.model.device) if start else ()
        call = kept[-1].call if kept else ""
        modules = [block.module for model in walk.models for block in model.blocks]
        with Returns(modules, copied=False) as returns:
            for index, finished in enumerate(walk.run(start, returned, call), start):
                with self.phases("write"):
                    yield self._keep(index, finished, returns)

    def _keep(self, index: int, finished: CompressedBlock, returns: Returns) -> KeptBlock:
        walk, writer = self.walk, self.writer
        first = writer.number_of_shards
        writer.add(finished.tensors)
        finished.tensors.clear()  # or they would stay until the next block is finished
        following, call = index + 1, ""
        if following < len(walk.model.blocks):
            self._save_returned(following, returns)
            call = walk.entered()
        warnings, self._told = walk.warnings[self._told :], len(walk.warnings)
        seconds = dict(self.phases.seconds)
        block = KeptBlock(finished.report, finished.schemes, warnings, call, seconds, self.phases.total, [])

        def note() -> None:
            block.shards = writer.shards[first:]
            self.work.keep_block(index, block)

        if self._keeps:
            writer.then(note)
        return block

    def _save_returned(self, following: int, returns: Returns) -> None:
        walk = self.walk
        if not self._keeps:
            return
        try:
            for lane, forwards in enumerate(lane.everyone for lane in walk.lanes):
                for number, forward in enumerate(forwards):
                    (value,) = returns.take([forward])
                    with forward.awake():
                        self.work.save_returned(following, lane, number, value)
        except UserError as error:
            self._keeps = False
            walk.progress.say(f"if this run is stopped, it has to begin again: {error.what}")
