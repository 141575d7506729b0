"""The way of the calibration tokens through the model: block by block, and within a block from one input group to
the next. At each group the recipe's steps decide about the matrices that read it; then the tokens go on through the
compressed matrices, so that everything is calibrated on what its compressed predecessors produce.

Steps that aim at the dense model's outputs need its rows too: then a second, dense lane of the same tokens runs in
lockstep, with its own copy of the block.

This is the file to read first, and the only one that joins methods and models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.block_pass import BlockPass, Rounding
from llmcompress.commit import Outcome, relative_errors
from llmcompress.core.grid import Levels, QuantGrid
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.profile import channel_peaks, described
from llmcompress.core.stats import InputStats
from llmcompress.distributed import ALONE, Team
from llmcompress.errors import UserError
from llmcompress.export.quantized import Scheme
from llmcompress.hidden_states import digest
from llmcompress.lane import Lane, beginning, require_finite, sample
from llmcompress.measure import Phases, peak_memory_bytes, release_freed_memory
from llmcompress.methods.uncalibrated import aimed_at_compressed, steadied, without_rows
from llmcompress.methods.unrounded import keeping_unrounded
from llmcompress.model.checkpoint import require_no_overflow
from llmcompress.model.groups import BlockMap, InputGroup, map_block
from llmcompress.model.load import BlockwiseModel
from llmcompress.needs import needs_of, samples_needed
from llmcompress.offload import parked_in
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.rehearsal import Rehearsal, spans
from llmcompress.report import BlockReport, GroupReport
from llmcompress.starved import MIN_EXPERT_ROWS, Starved
from llmcompress.suspend import AtMatrix, SuspendedForward, gates

#: what `BlockPass.arrivals` gives
Arrivals = Iterator[tuple[int, list[AtMatrix]]]


@dataclass
class CompressedBlock:
    """One finished block.

    Attributes:
        report: its errors and figures.
        tensors: by name on disk, in final form.
        schemes: of its quantized matrices, by module name.
    """

    report: BlockReport
    tensors: dict[str, Tensor] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)


class Walk:
    """Compresses a model's blocks in order.

    Args:
        model: the dense model, its blocks not loaded.
        recipe: what to do.
        tokens: (N, T) int64 calibration rows; none if no step reads any.
        replay: run blocks from their start to each group instead of suspending them: less memory, same result.
        offload: folder on whose disk forwards that wait in front of a block have their hidden states; None: in memory.
        team: processes that share the rows.
        phases: where the time went.
        progress: told of blocks and matrices as they come.

    Attributes:
        warnings: what was skipped or degraded so far.
        lanes: the calibration rows on their way, those of the model first; the dense twin's second, if there is one.
        models: of the lanes.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        recipe: Recipe,
        tokens: Tensor,
        *,
        replay: bool = False,
        offload: Path | None = None,
        team: Team = ALONE,
        phases: Phases | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.recipe, self.replay = model, recipe.sparing(model.routers), replay
        self._kind = SuspendedForward if offload is None else parked_in(offload)
        self.phases = phases or Phases()
        self.progress = progress or Progress(silent=True)
        self.progress.total_blocks = len(model.blocks)
        self.warnings: list[str] = []
        self._needs = needs_of(recipe)
        used = tokens[: samples_needed(recipe, *tokens.shape)]
        self.samples, self.tokens, self._probe = len(used), team.share(used), beginning(used)
        self.team = team
        self._stays_dense = recipe.propagate == "dense"
        self._smooths = any(method.smooths for method in recipe.methods)
        self._batch = min((method.batch for method in recipe.methods if method.batch), default=None)
        self._methods = recipe.methods  # as they are bound to the present block
        self.lanes: list[Lane] = []
        self.models = [model, *([model.twin()] if "cross" in self._needs else [])]
        self._spans = spans(model, self.recipe.targets)
        self._starved = Starved(model.expert_layers)

    @torch.no_grad()
    def run(
        self, start: int = 0, returned: Sequence[Sequence[object]] = (), call: str = ""
    ) -> Iterator[CompressedBlock]:
        """Yields each block when it is finished; its memory is freed when the next one is asked for.

        Args:
            start: number of the first block.
            returned: if it is not 0, what the block before it returned to each forward of each lane.
            call: what `entered` said when the block before it was finished, if that is to be checked.

        Raises:
            UserError: the forwards cannot go on from what was returned alone.
        """
        models = self.models
        with gates([block.module for model in models for block in model.blocks]):
            with self.phases("forward"):
                lanes = self.lanes = [
                    Lane(model, self.tokens, self._batch, self._kind, self._probe) for model in models
                ]
                for model in models:
                    model.release_embeddings()
                for lane, values in zip(lanes, returned, strict=True) if start else ():
                    for forward, value in zip(lane.everyone, values, strict=True):
                        forward.skip(start, value)
                if call and self.entered() != call:
                    raise UserError(
                        "more goes from block to block than what blocks return", self.model.blocks[start].name,
                        "start over with --force",
                    )  # fmt: skip
            for index, block in list(enumerate(self.model.blocks))[start:]:
                started = time.perf_counter()
                self.progress.begin_block(block.name)
                with self.phases("load"):
                    for model in models:
                        model.load_block(index)
                with self.phases("map"):
                    found = map_block(block, lanes[0].probe.call, self._smooths)
                finished = self._compress(index, found, lanes)
                finished.report.seconds = time.perf_counter() - started
                finished.report.peak_memory_bytes = peak_memory_bytes(self.model.device)
                self.progress.end_block(finished.report.sparsity)
                yield finished
                for model in models:
                    model.release_block(index)
                del finished, found
                release_freed_memory()
            for lane in lanes:  # here: one thread cannot end what waits in another
                lane.probe.abandon()

    def _seen(self, rows: list[Tensor]) -> Tensor:
        """Some rows of all processes."""
        return sample([self.team.gathered(sample(rows))])

    def entered(self) -> str:
        """Hash of what the block that the probes wait at is called with."""
        return digest([lane.probe.call for lane in self.lanes])

    def _compress(self, index: int, found: BlockMap, lanes: list[Lane]) -> CompressedBlock:
        """One block: serves its input groups as the tokens reach them."""
        groups = [g for g in found.groups if any(self.recipe.targets(m.name) for m in g.matrices)]
        outcome = Outcome(self.model, in_place=self.recipe.propagate in ("compressed", "pruned"))
        finished = CompressedBlock(BlockReport(self.model.blocks[index].name))
        with self.phases("compress"):
            view = self._rehearsal(index, groups, lanes)
            self._methods = tuple(method.for_block(view) for method in self.recipe.methods)
            if self.recipe.propagate == "pruned":
                self._methods = keeping_unrounded(self._methods)
        ahead = self.recipe.propagate == "block"
        for lane in lanes if self._stays_dense and index + 1 < len(self.model.blocks) else ():
            lane.probe.resume()  # now: weights that the tokens are past will be freed
        passes = [lane.through(index, groups, self.replay, ahead, self.team) for lane in lanes]
        for way in passes[1:]:  # tokens may go to other experts there
            way.served = {number for number, group in enumerate(groups) if self._starved.is_expert(group.name)}
        arrivals = [way.arrivals() for way in passes]
        while self._go_on(groups, passes[0], arrivals, outcome, finished.report):
            pass
        self._serve_unreached(found, groups, passes[0], outcome, finished.report)
        if index + 1 < len(self.model.blocks):
            self._enter_next(lanes, passes[0] if ahead else None, index, groups, outcome)
        self.warnings += outcome.notes - {*self.warnings}
        uncalled = [name for name in found.uncalled if self.recipe.targets(name)]
        self.warnings += [f"{name}: left dense, the block reads its weight without calling it" for name in uncalled]
        self.warnings += [*self._starved.warnings(), *outcome.warnings]
        with self.phases("pack"):
            finished.tensors, finished.schemes = outcome.tensors(index), outcome.schemes
            require_no_overflow(finished.tensors)
        return finished

    def _enter_next(
        self, lanes: list[Lane], ahead: BlockPass | None, index: int, groups: list[InputGroup], outcome: Outcome
    ) -> None:
        """Brings what has not left the block yet to the next one: the probes, and the rows if copies went ahead."""
        with self.phases("forward"):
            if ahead is not None:
                outcome.apply()
                lanes[0].through(index, groups, self.replay).finish(ahead.rounding, ahead.output_rounding)
            for lane in lanes if not self._stays_dense else ():
                lane.probe.resume()

    def _go_on(
        self, groups: list[InputGroup], way: BlockPass, arrivals: list[Arrivals], outcome: Outcome, report: BlockReport
    ) -> bool:
        """Lets all lanes go on to the next input group and serves it; False at the block's end.

        Nothing outlives it but what was decided: the group's rows are free when the tokens go on.
        """
        with self.phases("forward"):
            first = next(arrivals[0], None)
            if self._stays_dense and not self.replay:
                outcome.settle()
            alone = first is not None and self._starved.is_expert(groups[first[0]].name)
            arrived = [first, *(next(lane, None) for lane in ([] if alone else arrivals[1:]))]
        if any((at and at[0]) != (first and first[0]) for at in arrived):
            name = groups[first[0]].name if first else self.model.blocks[0].name
            raise UserError("its dense and compressed forwards take different ways", name, "use target: compressed")
        if first is None:
            return False
        release_freed_memory()  # what lay between is gone, and statistics are large
        with self.phases("compress"):
            for part in groups[first[0]].parts():
                work = self._serve(part, [at[1] for at in arrived if at], outcome, report)
        if self.recipe.propagate not in ("pruned", "dense"):
            self._round_from_now_on(way, first[0], work)
        release_freed_memory()
        return True

    def _rehearsal(self, index: int, groups: list[InputGroup], lanes: list[Lane]) -> Rehearsal:
        modules = [lane.model.blocks[index].module for lane in lanes]
        return Rehearsal(
            index, self.model.blocks[index].name, self._spans[index], modules[0], groups, self.recipe.targets,
            lanes[0].forwards, (modules[-1], lanes[-1].forwards), self.model.checkpoint.dtype, self.progress.note,
        )  # fmt: skip

    def _serve(
        self, group: InputGroup, places: list[list[AtMatrix]], outcome: Outcome, report: BlockReport
    ) -> MatrixGroup:
        """Runs the recipe on one input group, commits what it decided, and returns it."""
        reader, views = group.matrices[0], [m for m in group.matrices if self.recipe.targets(m.name)]
        rows, dense_rows = ([reader.rows(place.x) for place in lane] for lane in (places[0], places[-1]))
        require_finite(group.name, rows)
        reached = self.team.total(sum(len(x) for x in rows))
        if not rows:  # none here, or not even in another process
            nothing = torch.zeros(0 if reached else 1, group.width, dtype=self.model.dtype, device=self.model.device)
            rows = dense_rows = [nothing]
        needs, methods = self._plan(group, reached)
        peaks = self.team.gathered(channel_peaks(rows)[None]).amax(0)
        stats = InputStats(group.width, needs, device=rows[0].device, length=self.tokens.shape[1])
        for x, dense in zip(rows, dense_rows, strict=True):
            stats.update(x, dense)
        self.team.merge(stats)
        work = outcome.working_copies(group, [view.name for view in views])
        self.team.run(methods, work, stats)
        if self.samples and self._starved.is_expert(group.name):
            work.figures["rows"] = reached
        seen = self._seen(rows) if reached else None  # the error is that of the weights
        errors = relative_errors(work, views, seen, self._seen(dense_rows) if len(places) > 1 else seen, self.team)
        outcome.commit(group, work, places[0])
        for matrix, error in zip(work.matrices, errors, strict=True):
            report.matrices.append(outcome.report(matrix, error))
            self.progress.matrix(matrix.name, error)
        report.groups.append(self._group_report(group, work, peaks))
        self.warnings += work.warnings
        return work

    def _round_from_now_on(self, way: BlockPass, number: int, work: MatrixGroup) -> None:
        """The tokens that go on see rounded inputs and outputs where run time does."""
        if work.activations is not None:
            way.rounding[number] = _rounding(work.activations, work.activation_levels)
        for matrix in work:
            if matrix.outputs is not None:
                way.output_rounding[self.model.model.get_submodule(matrix.name)] = _rounding(matrix.outputs)

    def _group_report(self, group: InputGroup, work: MatrixGroup, peaks: Tensor) -> GroupReport:
        folded = work.smoothing is not None if self._smooths else None
        inputs = described(peaks, work.smoothing) if self.samples else {}
        return GroupReport(group.name, folded, group.fold_refusal if folded is False else "", work.figures, inputs)

    def _plan(self, group: InputGroup, rows: int) -> tuple[frozenset[str], tuple[Method, ...]]:
        """Statistics and steps for a group that so many rows reach."""
        is_expert = self._starved.is_expert(group.name)
        if is_expert and rows >= MIN_EXPERT_ROWS:
            return self._needs - {"cross"}, steadied(aimed_at_compressed(self._methods), group.width, rows)
        if (rows and not is_expert) or not self.samples:
            return self._needs, self._methods
        self._starved.note(group.name)
        return frozenset(), without_rows(self._methods, group.name)

    def _serve_unreached(
        self, found: BlockMap, groups: list[InputGroup], way: BlockPass, outcome: Outcome, report: BlockReport
    ) -> None:
        """Experts that got no token, and matrices that the block does not call."""
        lone = [InputGroup([m], m.shape[1]) for m in found.unreached if self.recipe.targets(m.name)]
        unserved = [number for number in range(len(groups)) if number not in way.served]
        with self.phases("compress"):
            for part in [part for group in lone for part in group.parts()]:
                self._serve(part, [[]], outcome, report)
            for number in unserved:
                work = [self._serve(part, [[]], outcome, report) for part in groups[number].parts()][-1]
                if self.recipe.propagate not in ("pruned", "dense"):
                    self._round_from_now_on(way, number, work)


def _rounding(grid: QuantGrid, levels: Levels | None = None) -> Rounding:
    return lambda x: grid.round_activations(x, levels)
