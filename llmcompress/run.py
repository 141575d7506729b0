"""One run, from an opened checkpoint to a published folder: calibrate, walk, write, evaluate what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.alone import Sensitivity
from llmcompress.annealing import Annealing, searched, with_ratios
from llmcompress.calibration import Calibration, digest
from llmcompress.determinism import arithmetic, determinism
from llmcompress.distributed import Team
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import compare
from llmcompress.export.card import model_card
from llmcompress.export.checkpoint import CheckpointWriter, Shard
from llmcompress.export.companions import COMPANIONS, REMOTE_CODE, companions
from llmcompress.export.destination import RECORD, check_disk_space, sync
from llmcompress.export.quantized import Scheme, storage_note
from llmcompress.hidden_states import kept_bytes
from llmcompress.identity import Hashing, differences, identity
from llmcompress.keeper import Keeper, follow
from llmcompress.key_values import key_value_scales
from llmcompress.measure import Phases, peak_memory_bytes, release_file_pages, versions
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.needs import samples_needed, warm_up
from llmcompress.options import Options
from llmcompress.plan import check_fit, estimate_size, without_misfits
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.recompress import Recompression
from llmcompress.record import new_record, small_files
from llmcompress.recover import recover
from llmcompress.report import Report
from llmcompress.restructure import copy_blocks, copy_rest, hidden_bytes, removable, restructure
from llmcompress.resume import KeptBlock, Workplace, folder_of
from llmcompress.savings import savings
from llmcompress.sensitivity import find_ratios, judging_share, settled, unsettled
from llmcompress.source import HELD_OUT_SEED, Source, draw_tokens
from llmcompress.walk import Walk

if TYPE_CHECKING:
    from llmcompress.pages.report_page import ReportPage


class Run:
    """One run: where it starts, what it does, and what has been measured."""

    def __init__(self, source: Source, recipe: Recipe, options: Options, progress: Progress, command: str) -> None:
        self.source, self.recipe, self.options = source, recipe, options
        self._asked, self._left_dense = recipe, list[str]()
        self.progress, self.command = progress, command
        self.phases = Phases()
        self._known: dict[str, Any] | None = None
        self.team = Team.assembled(source.device)
        alone = recipe.structured or searched(recipe) or any(m.learns for m in recipe.blockwise.methods)
        if self.team.size > 1 and alone:
            raise UserError("works in one process alone", f"recipe {recipe.name}", "start one process")

    def execute(self, target: Path, force: bool = False, resume: bool = False) -> Report:
        """Calibrates, walks, evaluates and publishes.

        Args:
            target: folder to write.
            force: replace an output of this program, and discard an unfinished run.
            resume: go on with an unfinished run of the same identity, or read the report of a finished one.
        """
        if self.team.rank:
            return self._follow(target)
        with closing(Hashing(self.source.checkpoint, self.options)) as self._hashing:
            return self._lead(target, force, resume)

    def _lead(self, target: Path, force: bool, resume: bool) -> Report:
        """What the process does that writes, alone or before others."""
        if resume and (report := self._finished(target)):
            self.team.told(None)
            return report
        with Workplace(target, resume, force) as work:
            with self.phases("load"):
                dense = self.source.open()
            if self.options.on_misfit == "skip":
                self.recipe, self._left_dense = without_misfits(self.recipe, dense)
            work.begin(self._identity, self.command, str(target))
            return self._begin(dense, work)

    def _follow(self, target: Path) -> Report:
        """What the processes do that do not write."""
        dense = self.source.open()
        if (told := self.team.told()) is not None:
            recipe, tokens = told
            work = Workplace(target)
            try:
                follow(self._new_walk(dense, recipe, tokens, work), work)
            except (OSError, SafetensorError) as error:
                raise work.told(error) or error from error
        return Report(model=self.source.name, recipe=self.recipe.name, output=str(target))

    def _new_walk(self, dense: BlockwiseModel, recipe: Recipe, tokens: Tensor, work: Workplace) -> Walk:
        o = self.options
        return Walk(
            dense, recipe, tokens, replay=o.replay, offload=work.folder if o.offload_activations else None,
            team=self.team, phases=self.phases, progress=self.progress,
        )  # fmt: skip

    def _begin(self, dense: BlockwiseModel, work: Workplace) -> Report:
        """Everything that may be refused, and the rows to calibrate on; then the rest."""
        walked, samples = self.recipe.blockwise, self.options.rows
        shapes = check_fit(walked, dense)
        removable(dense, self.recipe)  # refuses what has no groups to remove, before anything takes long
        if self.recipe.structured is None:
            samples = samples_needed(walked, samples, self.options.length)
        kept = work.finished_blocks()
        needed = estimate_size(dense, walked) + hidden_bytes(self.recipe, dense, self.options.recover_steps)
        needed += kept_bytes(dense, samples * self.options.length)
        check_disk_space(work.output, needed - sum(shard.nbytes for shard in _finished_shards(work, kept)))
        with self.phases("calibration"):
            drawn = None if work.goes_on else draw_tokens(self.source, samples, self.progress)
        with self.phases("kernels"), self.progress.phase("preparing kernels", 1):
            warm_up(walked, min(columns for _, columns in shapes.values()), dense.dtype)
        release_file_pages()  # the compiler, and what importing went through
        tokens, eval_tokens = work.tokens(drawn)
        assert tokens is not None
        return self._write(dense, tokens, eval_tokens, work, kept)

    def _write(
        self, dense: BlockwiseModel, tokens: Tensor, eval_tokens: Tensor | None, work: Workplace, kept: list[KeptBlock]
    ) -> Report:
        """Compresses block by block, and publishes the folder once it has been read back and judged."""
        source, report = self.source, self._new_report(eval_tokens)
        finished = _finished_shards(work, kept)
        with CheckpointWriter(work.output, work.force, source.folder, folder=work.model, finished=finished) as writer:
            start = self._starting_point(dense, tokens, work, report)
            _copy_rest_once(start, writer, work)
            schemes = self._walk(start, tokens, writer, work, kept, report)
            page = self._drawn(report, work)
            if self.recipe.kv_cache:
                with self.phases("kv cache"):
                    writer.add(key_value_scales(start.twin(), tokens))
                report.warnings.append("the evaluation does not round keys and values")
            saved = savings(schemes.values(), self.recipe.sparsity, bool(report.structure))
            report.savings = [asdict(saving) for saving in saved]
            patterns = COMPANIONS + (REMOTE_CODE if self.options.trust_remote_code else ())
            record = new_record(report, self.recipe, self.options.calibration_rows, writer.hashes)
            record |= {"command": work.command, "run": self._identity()}
            copied = {path.relative_to(source.folder): path for path in companions(source.folder, patterns)}
            writer.seal(small_files(start, schemes, self.recipe, record, copied), source.folder, patterns)
            report.size_bytes = {"before": source.checkpoint.size_bytes, "after": writer.total_bytes}
            if eval_tokens is not None:
                self._evaluate(dense, Checkpoint(writer.partial), eval_tokens, report)
            with self.phases("page"):
                html = page.result().html
            report.seconds_by_phase, report.seconds = self.phases.seconds, self.phases.total
            report.peak_memory_bytes = peak_memory_bytes(source.device)
            report.output = work.output_name
            card = model_card(report, self.recipe.to_yaml(), source.name, source.folder)
            writer.publish({"report.json": report.to_json() + "\n", "report.html": html(), "README.md": card})
        return report

    def _drawn(self, report: Report, work: Workplace) -> Future[ReportPage]:
        """The page of the walk's figures, drawn while the rest is written and judged."""

        def draw() -> ReportPage:
            from llmcompress.pages.report_page import ReportPage, Result  # plots are not loaded before

            return ReportPage(Result(work.output_name, report, self.recipe.to_yaml(), work.command))

        aside = ThreadPoolExecutor(1, "page")
        page = aside.submit(draw)
        aside.shutdown(wait=False)
        return page

    def _identity(self) -> dict[str, Any]:
        source = self.source
        if self._known is None:
            hashing = self._hashing
            with self.phases("hash"), self.progress.phase("hashing the model", len(hashing), "file") as advance:
                where = arithmetic(source.dtype, source.device, self._asked, self.team.size)
                self._known = identity(source.name, hashing.result(advance), self._asked, self.options, where)
        return self._known

    def _finished(self, target: Path) -> Report | None:
        """The report of a complete output of this very run; None if there is none, or an unfinished one.

        Raises:
            UserError: another run's output is there.
        """
        record = target / RECORD
        if (folder_of(target) / "model").is_dir() or not record.is_file():
            return None
        written = json.loads(record.read_text(encoding="utf-8")).get("run", {})
        if different := differences(written, self._identity()):
            raise UserError(f"is complete, and of another run: {'; '.join(different[:4])}", str(target),
                            "choose another --output, or replace it by --force without --resume")  # fmt: skip
        with Workplace(target, resume=True):  # removes what a run that was killed at its very end has left
            self.progress.say(f"{target} is complete already")
        return Report.from_json((target / "report.json").read_text(encoding="utf-8"))

    def _starting_point(self, dense: BlockwiseModel, tokens: Tensor, work: Workplace, report: Report) -> BlockwiseModel:
        """The model the walk begins with: the dense one, or what a structured step and its recovery leave of it."""
        method, o = self.recipe.structured, self.options
        if method is None:
            return dense
        with self.phases("structure"):
            model, report.structure = self._once(
                "smaller", work, lambda w: restructure(dense, method, self.recipe.targets, tokens, w, self.progress)
            )
        if o.recover_steps:
            with self.phases("recover"):
                model, report.recovery = self._once(
                    "recovered", work,
                    lambda w: recover(model, dense, tokens, o.recover_steps, o.recover, o.seed, w, self.progress),
                )  # fmt: skip
        check_fit(self.recipe.blockwise, model)
        return model

    def _once(
        self, name: str, work: Workplace, make: Callable[[CheckpointWriter], tuple[Checkpoint, dict[str, Any]]]
    ) -> tuple[BlockwiseModel, dict[str, Any]]:
        """The model that a step writes, and its figures: made, or what an earlier process made."""
        folder, record = work.folder / name, f"{name}.json"
        if work.kept(record) is None:
            with CheckpointWriter(work.output, folder=folder) as writer:
                _, figures = make(writer)
            sync(folder)
            work.keep(record, figures)
        return self.source.open(Checkpoint(folder)), work.kept(record)

    def _walk(
        self, dense: BlockwiseModel, tokens: Tensor, writer: CheckpointWriter, work: Workplace, kept: list[KeptBlock],
        report: Report,
    ) -> dict[str, Scheme]:  # fmt: skip
        if not self.recipe.blockwise.stages:
            with self.phases("write"):
                report.blocks = copy_blocks(dense, writer)
            return {}
        recipe = self._searched(self._allotted(dense, tokens, work, report), dense, tokens, work, report)
        self.team.told((recipe, tokens))
        walk = self._new_walk(dense, recipe, tokens, work)
        report.calibration["samples"] = walk.samples
        keeper = Keeper(walk, writer, work, self.phases)
        blocks = [*kept, *keeper.blocks(kept)]
        schemes = {name: scheme for block in blocks for name, scheme in block.schemes.items()}
        report.blocks = [block.report for block in blocks]
        report.warnings += self._left_dense + [warning for block in blocks for warning in block.warnings]
        report.warnings += sorted({note for s in schemes.values() if (note := storage_note(s))})
        return schemes

    def _allotted(self, dense: BlockwiseModel, tokens: Tensor, work: Workplace, report: Report) -> Recipe:
        """The recipe for the walk, with the blocks' sparsity ratios settled if they are to be found."""
        recipe = self.recipe.blockwise
        if unsettled(recipe) is None:
            return recipe
        with self.phases("sensitivity"):
            if work.kept("sensitivity.json") is None:
                engine = Sensitivity(dense, tokens, judging_share(tokens.numel()), self.options.replay)
                work.keep("sensitivity.json", find_ratios(recipe, engine, self.progress))
        report.sensitivity = work.kept("sensitivity.json")
        return settled(recipe, report.sensitivity["ratios"])

    def _searched(
        self, recipe: Recipe, dense: BlockwiseModel, tokens: Tensor, work: Workplace, report: Report
    ) -> Recipe:
        """The recipe with its clip ratios settled if they are to be searched for."""
        o = self.options
        if (clip := searched(recipe)) is None:
            return recipe
        with self.phases("anneal"):
            if work.kept("search.json") is None:
                engine = Recompression(dense, tokens, clip.validation, replay=o.replay)
                search = Annealing(recipe, engine, o.seed, work.folder / "annealing.json", self.progress)
                work.keep("search.json", search.run()[1])
        report.search = work.kept("search.json")
        return with_ratios(recipe, report.search["best"]["ratios"])

    def _evaluate(self, dense: BlockwiseModel, result: Checkpoint, tokens: Tensor, report: Report) -> None:
        """Reads the finished folder back: what is judged is what was written."""
        blocks = len(dense.blocks)
        with self.phases("evaluate"), self.progress.phase("evaluating", blocks, "block") as advance:
            report.take(compare(dense, self.source.open(result), tokens, lambda index: advance(1)))

    def _new_report(self, eval_tokens: Tensor | None) -> Report:
        o = self.options
        judged: dict[str, Any] = {}
        if eval_tokens is not None:
            seed = o.seed + HELD_OUT_SEED * (o.eval_text is None)
            rows = asdict(Calibration(o.eval_text or "self", len(eval_tokens), eval_tokens.shape[1], seed))
            judged = rows | {"sha256": digest(eval_tokens)}
        return Report(
            model=self.source.name,
            recipe=self.recipe.name,
            seed=o.seed,
            versions=versions(),
            calibration=asdict(o.calibration_rows) | {"propagate": self.recipe.propagate},
            evaluation=judged,
            determinism=determinism(self.recipe, self.source.device, torch.get_num_threads(), self.team.size),
        )


def _finished_shards(work: Workplace, kept: list[KeptBlock]) -> list[Shard]:
    """What an earlier process wrote, in the order of writing."""
    return work.finished_rest() + [shard for block in kept for shard in block.shards]


def _copy_rest_once(model: BlockwiseModel, writer: CheckpointWriter, work: Workplace) -> None:
    """What lies outside the blocks, copied while the first of them is compressed, if no earlier process did."""
    if work.finished_rest():
        return
    first = writer.number_of_shards
    copy_rest(model, writer)
    writer.then(lambda: work.keep_rest(writer.shards[first:]))
