"""One run, from an opened checkpoint to a published folder: calibrate, walk, write, evaluate what was written."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.annealing import Annealing, searched, state_file
from llmcompress.arithmetic import choose_device, choose_dtype
from llmcompress.calibration import Calibration, evaluation_rows, token_rows
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import compare
from llmcompress.export.card import model_card
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.companions import COMPANIONS, REMOTE_CODE
from llmcompress.export.destination import RECORD, check_disk_space
from llmcompress.export.quantized import Scheme, quantization_config, storage_note
from llmcompress.measure import Phases, peak_memory_bytes, versions
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.locate import locate
from llmcompress.options import Options
from llmcompress.plan import check_fit, estimate_size
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.recompress import Recompression
from llmcompress.recover import recover
from llmcompress.report import Report
from llmcompress.restructure import copy_model, copy_rest, hidden_bytes, removable, restructure
from llmcompress.sampling import self_samples
from llmcompress.walk import Walk, samples_needed, warm_up

#: sequences of the model's own samples on which the result is judged if no text is given, and their seed's offset
HELD_OUT_SAMPLES = 16
HELD_OUT_SEED = 1_000_003


class Source:
    """The dense model a run starts from: found, opened, and the device and dtype it will be computed in."""

    def __init__(self, model: str | Path, options: Options) -> None:
        self.name, self.options = str(model), options
        self.folder = locate(self.name)
        self.checkpoint = Checkpoint(self.folder)
        if self.checkpoint.config.get("quantization_config"):
            raise UserError("is quantized already", str(self.folder), "give the dense checkpoint")
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.checkpoint, self.device)

    def open(self, checkpoint: Checkpoint | None = None) -> BlockwiseModel:
        """The model, or one saved from it, its blocks on disk."""
        code = self.options.trust_remote_code
        return BlockwiseModel(checkpoint or self.checkpoint, self.dtype, self.device, code)


def draw_tokens(source: Source, samples: int, progress: Progress) -> tuple[Tensor | None, Tensor | None]:
    """(N, T) calibration rows and evaluation rows; None where not wanted.

    Args:
        samples: how many of the calibration rows will be used; what the model writes itself is no longer than that.

    Texts are read first, as they may be too short; what the model has to write itself is written in one go.
    """
    o = source.options
    rows = eval_rows = None
    wanted: list[tuple[int, int, int]] = []
    if samples and o.calibration == "self":
        wanted.append((samples, o.length, o.seed))
    elif samples:
        rows = _read_rows(source)
    if o.evaluate and o.eval_text is None:
        wanted.append((HELD_OUT_SAMPLES, o.length, o.seed + HELD_OUT_SEED))
    elif o.evaluate:
        eval_rows = _read_eval_rows(source, str(o.eval_text))
    if wanted:
        total = sum(count * length for count, length, _ in wanted)
        with progress.phase("sampling the model", total, "token") as advance:
            drawn = self_samples(
                source.folder, wanted,
                device=source.device, dtype=source.dtype, trust_remote_code=o.trust_remote_code, advance=advance,
            )  # fmt: skip
        if samples and rows is None:
            rows = drawn.pop(0)
        if o.evaluate and eval_rows is None:
            eval_rows = drawn.pop(0)
    return rows, eval_rows


class Run:
    """One run: where it starts, what it does, and what has been measured."""

    def __init__(self, source: Source, recipe: Recipe, options: Options, progress: Progress, command: str) -> None:
        self.source, self.recipe, self.options = source, recipe, options
        self.progress, self.command = progress, command
        self.phases = Phases()

    def execute(self, target: Path, force: bool) -> Report:
        """Calibrates, walks, evaluates and publishes."""
        source = self.source
        with self.phases("load"):
            dense = source.open()
        walked = self.recipe.blockwise
        shapes = check_fit(walked, dense)
        removable(dense, self.recipe)  # refuses what has no groups to remove, before anything takes long
        check_disk_space(
            target, estimate_size(dense, walked) + hidden_bytes(self.recipe, dense, self.options.recover_steps)
        )
        with self.phases("calibration"):
            samples = self.options.samples
            if self.recipe.structured is None:
                samples = samples_needed(walked, samples, self.options.length)
            tokens, eval_tokens = draw_tokens(source, samples, self.progress)
        with self.phases("kernels"), self.progress.phase("preparing kernels", 1):
            warm_up(walked, min(columns for _, columns in shapes.values()))
        assert tokens is not None
        report = self._new_report(eval_tokens)
        with CheckpointWriter(target, force, source.folder) as writer, ExitStack() as hidden:
            start = self._starting_point(dense, tokens, target, hidden, report)
            schemes = self._walk(start, tokens, writer, report)
            patterns = COMPANIONS + (REMOTE_CODE if self.options.trust_remote_code else ())
            writer.seal(self._files(start, schemes, writer, report), source.folder, patterns)
            report.size_bytes = {"before": source.checkpoint.size_bytes, "after": writer.total_bytes}
            if eval_tokens is not None:
                self._evaluate(dense, Checkpoint(writer.partial), eval_tokens, report)
            report.seconds_by_phase, report.seconds = self.phases.seconds, self.phases.total
            report.peak_memory_bytes = peak_memory_bytes(source.device)
            report.output = str(target)
            card = model_card(report, self.recipe.to_yaml(), source.name, source.folder)
            writer.publish({"report.json": report.to_json() + "\n", "README.md": card})
        state_file(writer.output).unlink(missing_ok=True)
        return report

    def _starting_point(
        self, dense: BlockwiseModel, tokens: Tensor, target: Path, hidden: ExitStack, report: Report
    ) -> BlockwiseModel:
        """The model the walk begins with: the dense one, or what a structured step and its recovery leave of it."""
        method, o, model = self.recipe.structured, self.options, dense
        if method is None:
            return dense

        def folder(what: str) -> CheckpointWriter:
            return hidden.enter_context(CheckpointWriter(target.with_name(f".{target.name}.{what}")))

        with self.phases("structure"):
            checkpoint, report.structure = restructure(
                dense, method, self.recipe.targets, tokens, folder("smaller"), self.progress
            )
            model = self.source.open(checkpoint)
        if o.recover_steps:
            with self.phases("recover"):
                checkpoint, report.recovery = recover(
                    model, dense, tokens, o.recover_steps, o.recover, o.seed, folder("recovered"), self.progress
                )
                model = self.source.open(checkpoint)
        check_fit(self.recipe.blockwise, model)
        return model

    def _walk(
        self, dense: BlockwiseModel, tokens: Tensor, writer: CheckpointWriter, report: Report
    ) -> dict[str, Scheme]:
        if not self.recipe.blockwise.stages:
            with self.phases("write"):
                report.blocks = copy_model(dense, writer)
            return {}
        schemes: dict[str, Scheme] = {}
        recipe, o = self.recipe.blockwise, self.options
        if (clip := searched(recipe)) is not None:
            with self.phases("anneal"):
                engine = Recompression(dense, tokens, clip.validation, replay=o.low_memory)
                search = Annealing(recipe, engine, o.seed, state_file(writer.output), self.progress)
                recipe, report.search = search.run()
        walk = Walk(dense, recipe, tokens, replay=o.low_memory, phases=self.phases, progress=self.progress)
        report.calibration["samples"] = len(walk.tokens)
        for finished in walk.run():
            with self.phases("write"):
                writer.add(finished.tensors)
                finished.tensors.clear()  # or they would stay until the next block is finished
            schemes.update(finished.schemes)
            report.blocks.append(finished.report)
        with self.phases("write"):
            copy_rest(dense, writer)
        report.warnings += walk.warnings + sorted({note for s in schemes.values() if (note := storage_note(s))})
        return schemes

    def _evaluate(self, dense: BlockwiseModel, result: Checkpoint, tokens: Tensor, report: Report) -> None:
        """Reads the finished folder back: what is judged is what was written."""
        blocks = len(dense.blocks)
        with self.phases("evaluate"), self.progress.phase("evaluating", blocks, "block") as advance:
            report.take(compare(dense, self.source.open(result), tokens, lambda index: advance(1)))

    def _new_report(self, eval_tokens: Tensor | None) -> Report:
        o = self.options
        judged = None
        if eval_tokens is not None:
            rows, length = eval_tokens.shape
            judged = Calibration(o.eval_text or "self", rows, length, o.seed + HELD_OUT_SEED * (o.eval_text is None))
        return Report(
            model=self.source.name,
            recipe=self.recipe.name,
            seed=o.seed,
            versions=versions(),
            calibration=asdict(o.calibration_rows) | {"propagate": self.recipe.propagate},
            evaluation=asdict(judged) if judged else {},
        )

    def _files(
        self, dense: BlockwiseModel, schemes: dict[str, Scheme], writer: CheckpointWriter, report: Report
    ) -> dict[str, str]:
        config = dict(dense.checkpoint.config)
        if schemes:
            stored = {dense.stored_name(name): scheme for name, scheme in schemes.items()}
            linears = [dense.stored_name(name) for name in dense.linears]
            config["quantization_config"] = quantization_config(stored, linears)
        return {
            "config.json": _json(config),
            "recipe.yaml": self.recipe.to_yaml(),
            RECORD: _json(self._record(writer, report)),
        }

    def _record(self, writer: CheckpointWriter, report: Report) -> dict[str, Any]:
        """What the folder says about itself: pattern and counts per matrix, versions, seed, hashes."""
        sparsity = self.recipe.sparsity
        return {
            "model": report.model,
            "recipe": {"name": self.recipe.name, "hash": self.recipe.hash},
            "command": self.command,
            "seed": report.seed,
            "versions": report.versions,
            "calibration": asdict(self.options.calibration_rows),
            "pattern": str(sparsity) if sparsity else "dense",
            "structure": report.structure,
            "matrices": {
                m.name: {"shape": list(m.shape), "zeros": round(m.sparsity * m.weights), "bits": m.bits}
                for m in report.matrices
            },
            "sha256": writer.hashes,
        }


def _read_rows(source: Source) -> Tensor:
    o = source.options
    return token_rows(o.calibration_rows, source.folder, trust_remote_code=o.trust_remote_code)


def _read_eval_rows(source: Source, text: str) -> Tensor:
    o = source.options
    return evaluation_rows(text, source.folder, o.length, trust_remote_code=o.trust_remote_code)


def _json(tree: object) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
