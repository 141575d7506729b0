"""The way of the calibration tokens through the model: block by block, and within a block from one input group to
the next. At each group the recipe's steps decide about the matrices that read it; then the tokens go on through the
compressed matrices, so that everything is calibrated on what its compressed predecessors produce.

This is the file to read first, and the only one that joins methods and models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcompress.core.grid import Levels, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, run_methods
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.export.quantized import Scheme, pack, unsupported
from llmcompress.model.groups import BlockMap, InputGroup, map_block
from llmcompress.model.load import Block, BlockwiseModel
from llmcompress.model.matrix import MatrixView
from llmcompress.recipe import Recipe
from llmcompress.report import BlockReport, MatrixReport, Phases
from llmcompress.suspend import AtBlock, AtMatrix, BlockPass, Stop, SuspendedForward, gates

#: rows on which the error of a matrix is measured
ERROR_ROWS = 512
#: tokens of the probe that finds input groups and verifies folds
PROBE_TOKENS = 16


@dataclass
class CompressedBlock:
    """One finished block.

    Attributes:
        tensors: by name on disk, in final form.
        schemes: of its quantized matrices, by module name.
        report: its errors and figures.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    report: BlockReport | None = None


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes of one matrix, how they are stored, and the levels of a static input grid."""

    weight: QuantizedWeight
    scheme: Scheme
    input_levels: Levels | None


@dataclass
class Outcome:
    """What a served group leaves behind: new values of parameters, by parameter name."""

    dense: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict)


class Walk:
    """Compresses a model's blocks in order.

    Args:
        model: the dense model, its blocks not loaded.
        recipe: what to do.
        tokens: (N, T) int64 calibration rows.
        replay: run blocks from their start to each group instead of suspending them: less memory, same result.
        phases: where the time went.
        on_matrix: called with (matrix name, relative error) as matrices are finished.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        recipe: Recipe,
        tokens: Tensor,
        *,
        replay: bool = False,
        phases: Phases,
        on_matrix: Callable[[str, float], None] = lambda name, error: None,
    ) -> None:
        self.model, self.recipe, self.replay = model, recipe, replay
        self.phases, self.on_matrix = phases, on_matrix
        self.batches = micro_batches(tokens)
        self.probe = tokens[:1, :PROBE_TOKENS]
        self.storage_dtype = model.checkpoint.dtype
        self.warnings: list[str] = []

    @torch.no_grad()
    def run(self) -> Iterator[CompressedBlock]:
        """Yields each block when it is finished; its memory is freed when the next one is asked for."""
        model = self.model
        with gates([block.module for block in model.blocks]):
            with self.phases("forward"):
                probe, *forwards = start_forwards(model, [self.probe, *self.batches])
            for index in range(len(model.blocks)):
                started = time.perf_counter()
                with self.phases("load"):
                    block = model.load_block(index)
                with self.phases("map"):
                    found = map_block(block, call_of(probe))
                finished = self._compress(block, found, forwards, probe, index)
                assert finished.report is not None
                finished.report.seconds = time.perf_counter() - started
                yield finished
                model.release_block(index)

    def _compress(
        self, block: Block, found: BlockMap, forwards: list[SuspendedForward], probe: SuspendedForward, index: int
    ) -> CompressedBlock:
        groups = [g for g in found.groups if any(self.recipe.targets(m.name) for m in g.matrices)]
        stops = [Stop([m.module for m in g.matrices], g.fold.norm if g.fold else None) for g in groups]
        through = BlockPass(block.module, stops, forwards, self.replay)
        finished = CompressedBlock(block.name, report=BlockReport(block.name))
        outcome = Outcome()
        arrivals = through.arrivals()
        while True:
            with self.phases("forward"):
                arrival = next(arrivals, None)
            if arrival is None:
                break
            number, places = arrival
            with self.phases("compress"):
                served = self._serve(groups[number], places, outcome, finished)
            if served.activations is not None:
                through.rounding[number] = _rounding(served)
        with self.phases("forward"):
            probe.resume()
        self._note_unreached(found, groups, through)
        with self.phases("pack"):
            self._collect(index, outcome, finished)
        return finished

    def _serve(
        self, group: InputGroup, places: list[AtMatrix], outcome: Outcome, finished: CompressedBlock
    ) -> MatrixGroup:
        """Runs the recipe on one input group and commits what it decided."""
        rows = [place.x.reshape(-1, group.width) for place in places]
        _require_finite(group.name, rows)
        work = self._working_copies(group)
        originals = [m.weight for m in work.matrices]
        stats = InputStats(group.width, self._needs(), device=rows[0].device)
        for x in rows:
            stats.update(x)
        run_methods(self.recipe.methods, work, stats)
        errors = relative_errors(work, originals, _sample(rows))
        self._commit(group, work, places, outcome)
        assert finished.report is not None
        for matrix, error in zip(work.matrices, errors, strict=True):
            finished.report.matrices.append(_matrix_report(matrix, error))
            self.on_matrix(matrix.name, error)
        finished.report.groups.append({"name": group.name, **work.figures})
        self.warnings += work.warnings
        return work

    def _needs(self) -> frozenset[str]:
        """Statistics that the steps up to the first one that gathers its own ask for."""
        needs: frozenset[str] = frozenset()
        for method in self.recipe.methods:
            needs |= method.needs
            if method.stage == "clip":
                return needs
        return needs

    def _working_copies(self, group: InputGroup) -> MatrixGroup:
        targeted = [m for m in group.matrices if self.recipe.targets(m.name)]
        others = [m for m in group.matrices if not self.recipe.targets(m.name)]
        fold, dtype = group.fold, self.storage_dtype
        work = MatrixGroup(
            [Matrix(m.name, m.read(), dtype) for m in targeted],
            [Matrix(m.name, m.read(), dtype) for m in others],
            fold_refusal=group.fold_refusal,
        )
        if fold is not None:
            work.snap = lambda s: fold.snap(s, dtype)
        return work

    def _commit(self, group: InputGroup, work: MatrixGroup, places: list[AtMatrix], outcome: Outcome) -> None:
        """Writes values into the modules, rounded as they will be stored; folds; renews the waiting rows."""
        views = {m.name: m for m in group.matrices}
        for matrix in work.matrices:
            self._commit_matrix(views[matrix.name], matrix, work, outcome)
        if work.smoothing is None or group.fold is None:
            return
        for matrix in work.bystanders:
            self._commit_matrix(views[matrix.name], matrix, work, outcome)
        group.fold.divide(work.smoothing, self.storage_dtype)
        norm_name = _module_name(self.model.model, group.fold.norm)
        for attribute, value in group.fold.norm.named_parameters():
            outcome.dense[f"{norm_name}.{attribute}"] = value.to(self.storage_dtype, copy=True)
        for place in places:
            if place.norm_input is None:
                raise RuntimeError(f"{group.name}: the norm that writes its input did not run before it")
            place.x.copy_(group.fold.norm(place.norm_input).view_as(place.x))

    def _commit_matrix(self, view: MatrixView, matrix: Matrix, work: MatrixGroup, outcome: Outcome) -> None:
        if matrix.quantized is not None:
            scheme = Scheme(matrix.quantized.grid, work.activations)
            reason = unsupported(type(view.module))
            if not reason:
                view.write(matrix.weight)
                outcome.quantized[view.name] = QuantizedMatrix(matrix.quantized, scheme, work.activation_levels)
                return
            work.activations = None
            self.warnings.append(f"{view.name}: weights stored rounded but dense, inputs not rounded: {reason}")
        stored = matrix.weight.to(self.storage_dtype)
        view.write(stored)
        outcome.dense[f"{view.name}.weight"] = view.as_stored(stored)

    def _collect(self, index: int, outcome: Outcome, finished: CompressedBlock) -> None:
        """The block's tensors by name on disk: changed ones from the outcome, the others as they were."""
        model = self.model
        renewed: set[str] = set()
        for parameter, value in outcome.dense.items():
            finished.tensors[model.disk_name(parameter)] = value
            renewed.add(model.disk_name(parameter))
        for name, q in outcome.quantized.items():
            disk_name = model.disk_name(f"{name}.weight")
            renewed.add(disk_name)
            for suffix, value in pack(q.weight, q.scheme, self.storage_dtype, q.input_levels).items():
                finished.tensors[disk_name.removesuffix("weight") + suffix] = value
            finished.schemes[name] = q.scheme
        untouched = [name for name in model.block_sources(index) if name not in renewed]
        finished.tensors.update(model.checkpoint.read(untouched))

    def _note_unreached(self, found: BlockMap, groups: list[InputGroup], through: BlockPass) -> None:
        for number, group in enumerate(groups):
            if number not in through.served:
                self.warnings.append(f"{group.name}: left dense, no calibration token reached it")
        self.warnings += [
            f"{n}: left dense, no probe token reached it" for n in found.unreached if self.recipe.targets(n)
        ]


def start_forwards(model: BlockwiseModel, batches: list[Tensor]) -> list[SuspendedForward]:
    """One forward of the whole model per micro-batch, each waiting at the first block."""

    def forward_of(ids: Tensor) -> Callable[[], Tensor]:
        return lambda: model.model(input_ids=ids.to(model.device), use_cache=False).logits

    forwards = [SuspendedForward(forward_of(ids)) for ids in batches]
    for forward in forwards:
        forward.resume()
    return forwards


def call_of(forward: SuspendedForward) -> tuple[tuple[object, ...], dict[str, object]]:
    """The block call a forward waits at."""
    if not isinstance(forward.place, AtBlock):
        raise UserError("its forward does not call its blocks one after the other", "model", "it is not supported")
    return forward.place.args, forward.place.kwargs


def micro_batches(tokens: Tensor, limit: int = 4096) -> list[Tensor]:
    """Rows in batches of about ``limit`` tokens: large enough for full-speed matrix products."""
    return list(tokens.split(max(1, limit // tokens.shape[1])))


def relative_errors(work: MatrixGroup, originals: list[Tensor], rows: Tensor) -> list[float]:
    """‖(W − Q)X‖² / ‖WX‖² per matrix on raw rows (tokens, in), in the arithmetic of the rows.

    Q is taken back to the unsmoothed inputs.
    """
    back = 1.0 if work.smoothing is None else 1 / work.smoothing
    errors = []
    for matrix, dense in zip(work.matrices, originals, strict=True):
        lost = rows @ (dense - matrix.weight * back).to(rows.dtype).T
        whole = rows @ dense.to(rows.dtype).T
        errors.append(float(lost.float().square().sum() / whole.float().square().sum().clamp(min=1e-30)))
    return errors


def _rounding(work: MatrixGroup) -> Callable[[Tensor], Tensor]:
    grid, levels = work.activations, work.activation_levels
    assert grid is not None
    return lambda x: grid.round_activations(x, levels)


def _sample(rows: list[Tensor]) -> Tensor:
    """At most ERROR_ROWS rows, evenly spread over all of them, (tokens, in), copied."""
    stride = max(1, sum(len(x) for x in rows) // ERROR_ROWS)
    return torch.cat([x[::stride] for x in rows])[:ERROR_ROWS]


def _require_finite(name: str, rows: list[Tensor]) -> None:
    for x in rows:
        if not bool(torch.isfinite(x.sum(dtype=torch.float32))) and not bool(torch.isfinite(x).all()):
            raise UserError(
                "NaN or infinite activations reach it", name, "try --dtype float32, or check the checkpoint"
            )


def _matrix_report(matrix: Matrix, error: float) -> MatrixReport:
    quantized = matrix.quantized
    bits = quantized.grid.bits_per_weight(matrix.columns) if quantized else 8.0 * matrix.scale_dtype.itemsize
    zeros = 1 - int(matrix.weight.count_nonzero()) / matrix.weight.numel()
    return MatrixReport(matrix.name, tuple(matrix.weight.shape), zeros, bits, error)


def _module_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)
