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
        call = walk.team.told((start, kept[-1].call if kept else ""))[1]
        if start == number:
            return
        for index, finished, returns in _walked(walk, self.work, start, call):
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
        walk.team.wait()  # until the others' forwards are on disk too
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
        refusal = save_all(self.walk, self.work, following, returns) if self._keeps else ""
        if refusal:
            self._keeps = False
            self.walk.progress.say(f"if this run is stopped, it has to begin again: {refusal}")


def follow(walk: Walk, work: Workplace) -> None:
    """What the processes of a team do that do not write: they walk along, and keep their own forwards' values."""
    start, call = walk.team.told()
    number, keeps = len(walk.model.blocks), True
    for index, finished, returns in _walked(walk, work, start, call) if start < number else ():
        finished.tensors.clear()
        if keeps and index + 1 < number:
            keeps = not save_all(walk, work, index + 1, returns)
            work.sync_returned(index + 1, walk.team.rank)
        walk.team.wait()


def save_all(walk: Walk, work: Workplace, following: int, returns: Returns) -> str:
    """Writes what the block before block ``following`` returned to each forward of this process.

    Returns:
        Why that is impossible; empty if it is done.
    """
    try:
        for lane, forwards in enumerate(lane.everyone for lane in walk.lanes):
            for number, forward in enumerate(forwards):
                (value,) = returns.take([forward])
                with forward.awake():
                    work.save_returned(following, lane, number, value, walk.team.rank)
    except UserError as error:
        return error.what
    return ""


def _walked(
    walk: Walk, work: Workplace, start: int, call: str
) -> Iterator[tuple[int, CompressedBlock, Returns]]:  # fmt: skip
    returned = work.returned(start, len(walk.models), walk.model.device, walk.team.rank) if start else ()
    modules = [block.module for model in walk.models for block in model.blocks]
    with Returns(modules, copied=False) as returns:
        for index, finished in enumerate(walk.run(start, returned, call), start):
            yield index, finished, returns
