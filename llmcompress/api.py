"""The program in three functions: compress a checkpoint, load the result, evaluate it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration import Calibration, evaluation_rows, self_samples, token_rows
from llmcompress.errors import UserError
from llmcompress.evaluate.divergence import Comparison
from llmcompress.evaluate.stream import compare
from llmcompress.export.card import model_card
from llmcompress.export.checkpoint import RECORD, CheckpointWriter, check_disk_space, check_output
from llmcompress.export.quantized import Scheme, quantization_config, storage_note
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.locate import locate, short_name
from llmcompress.plan import Plan, check_fit, estimate_size, make_plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import Phases, Report, peak_memory_bytes, versions
from llmcompress.runtime.loading import load
from llmcompress.walk import Walk

__all__ = ["Options", "compress", "evaluate", "load", "plan"]

#: sequences of the model's own samples on which the result is judged if no text is given, and their seed's offset
HELD_OUT_SAMPLES = 32
HELD_OUT_SEED = 1_000_003
#: below this many parameters arithmetic on a CPU is float32 whatever the checkpoint stores
SMALL_MODEL = 500_000_000


@dataclass(frozen=True)
class Options:
    """Everything about a run but the model and the recipe.

    Attributes:
        calibration: ``self``, a text or JSONL file, or ``DATASET[:split]``.
        samples, length: calibration rows and tokens per row.
        eval_text: file on which the result is judged; None takes held-out samples of the model itself.
        evaluate: False leaves perplexity and divergence out.
        seed: of everything random.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the arithmetic: ``auto``, ``float32`` or ``bfloat16``. Weights are stored in the checkpoint's dtype.
        low_memory: replay blocks instead of suspending them.
        trust_remote_code: run code that came with the checkpoint.
    """

    calibration: str = "self"
    samples: int = 64
    length: int = 512
    eval_text: str | None = None
    evaluate: bool = True
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    low_memory: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)} is not a positive number", f"--{name}")


def compress(
    model: str | Path,
    recipe: str | Path | Recipe = "jsq",
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> Report:
    """Compresses a checkpoint and writes the result as a folder that transformers and vLLM load.

    Args:
        model: preset, folder or Hub id.
        recipe: name, YAML file or Recipe.
        output: folder to write; default ``compressed/<model>-<recipe>``.
        options: calibration, evaluation, arithmetic.
        overrides: ``stage.key=value`` changes to the recipe.
        force: replace an output this program wrote before.
        progress: where to show it; None is silent.
        command: the command line, for the record.

    Returns:
        The report that is also saved as ``report.json``.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    options = options or Options()
    run = _Run(model, recipe, options, overrides, progress or Progress(silent=True), command)
    return run.execute(run.check_target(output, force), force)


def plan(
    model: str | Path,
    recipe: str | Path | Recipe = "jsq",
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
) -> Plan:
    """What `compress` would do with the same arguments: blocks, input groups, folds, memory, size. Writes nothing."""
    run = _Run(model, recipe, options or Options(), overrides, Progress(silent=True), "")
    run.check_target(output, force)
    return make_plan(run.open_dense(), run.recipe, run.options.samples, run.options.length)


def evaluate(
    model: str | Path, reference: str | Path, text: str | Path | None = None, options: Options | None = None
) -> Comparison:
    """Compares a compressed folder with its dense model on a text, or on held-out samples of the dense model."""
    options = options or Options()
    if text is not None:
        options = Options(**{**options.__dict__, "eval_text": str(text)})
    run = _Run(reference, "rtn-w8a8", options, (), Progress(silent=True), "")
    tokens = run.draw_tokens(calibration=False)[1]
    assert tokens is not None
    dense = run.open_dense()
    return compare(dense, BlockwiseModel(Checkpoint(locate(str(model))), dense.dtype, dense.device), tokens)


class _Run:
    """One run: the opened checkpoint, the recipe, and what has been measured."""

    def __init__(
        self,
        model: str | Path,
        recipe: str | Path | Recipe,
        options: Options,
        overrides: Iterable[str],
        progress: Progress,
        command: str,
    ) -> None:
        self.model_name, self.options, self.progress, self.command = str(model), options, progress, command
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
        self.folder = locate(str(model))
        self.checkpoint = Checkpoint(self.folder)
        if "quantization_config" in self.checkpoint.config:
            raise UserError("is quantized already", str(self.folder), "give the dense checkpoint")
        self.device = _device(options.device)
        self.dtype = _dtype(options.dtype, self.checkpoint, self.device)
        self.phases = Phases()

    def check_target(self, output: str | Path | None, force: bool) -> Path:
        """The output folder, by default ``compressed/<model>-<recipe>``, checked before anything is loaded."""
        target = Path(output) if output else Path("compressed") / f"{short_name(self.model_name)}-{self.recipe.name}"
        check_output(target, force, self.folder)
        return target

    def open_dense(self) -> BlockwiseModel:
        """The dense model, its blocks on disk."""
        with self.phases("load"):
            return BlockwiseModel(self.checkpoint, self.dtype, self.device, self.options.trust_remote_code)

    def execute(self, target: Path, force: bool) -> Report:
        """Calibrates, walks, evaluates and publishes."""
        dense = self.open_dense()
        check_fit(self.recipe, dense)
        check_disk_space(target, estimate_size(dense, self.recipe))
        tokens, eval_tokens = self.draw_tokens()
        assert tokens is not None
        report = self._new_report()
        with CheckpointWriter(target, force, self.folder) as writer:
            schemes = self._walk(dense, tokens, writer, report)
            files = self._files(dense, schemes, writer, report)
            writer.seal(files, copy_from=self.folder)
            report.size_bytes = {"before": self.checkpoint.size_bytes, "after": writer.total_bytes}
            if eval_tokens is not None:
                self._evaluate(dense, Checkpoint(writer.partial), eval_tokens, report)
            report.seconds_by_phase = self.phases.seconds
            report.seconds = self.phases.total
            report.peak_memory_bytes = peak_memory_bytes()
            card = model_card(report, self.recipe.to_yaml(), self.model_name, self.folder)
            writer.publish({"report.json": report.to_json(), "README.md": card})
        report.output = str(target)
        return report

    def draw_tokens(self, calibration: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """(N, T) calibration rows and evaluation rows; None where not wanted."""
        o = self.options
        requests = []
        if calibration and o.calibration == "self":
            requests.append((o.samples, o.length, o.seed))
        held_out = o.evaluate and o.eval_text is None
        if held_out:
            requests.append((HELD_OUT_SAMPLES, o.length, o.seed + HELD_OUT_SEED))
        with self.phases("calibration"), self.progress.phase("sampling the model" if requests else "reading text"):
            drawn = self_samples(self.folder, requests, trust_remote_code=o.trust_remote_code) if requests else []
            own = drawn.pop(0) if calibration and o.calibration == "self" else None
            if calibration and own is None:
                own = token_rows(Calibration(o.calibration, o.samples, o.length, o.seed), self.folder)
            if held_out:
                return own, drawn.pop(0)
            return own, evaluation_rows(
                Path(o.eval_text), self.folder, o.length
            ) if o.evaluate and o.eval_text else None

    def _walk(
        self, dense: BlockwiseModel, tokens: Tensor, writer: CheckpointWriter, report: Report
    ) -> dict[str, Scheme]:
        schemes: dict[str, Scheme] = {}
        with self.progress.blocks(len(dense.blocks)) as bar:
            walk = Walk(
                dense, self.recipe, tokens,
                replay=self.options.low_memory, phases=self.phases, on_matrix=bar.matrix,
            )  # fmt: skip
            for finished in walk.run():
                with self.phases("write"):
                    writer.add(finished.tensors)
                schemes.update(finished.schemes)
                report.blocks.append(finished.report)
                bar.block(finished.report)
        with self.phases("write"):
            for names in self.checkpoint.in_chunks(dense.rest_sources()):
                writer.add(self.checkpoint.read(names))
        report.warnings += walk.warnings + sorted({note for s in schemes.values() if (note := storage_note(s))})
        return schemes

    def _evaluate(self, dense: BlockwiseModel, result: Checkpoint, tokens: Tensor, report: Report) -> None:
        with self.phases("evaluate"), self.progress.phase("evaluating"):
            compressed = BlockwiseModel(result, self.dtype, self.device, self.options.trust_remote_code)
            report.take(compare(dense, compressed, tokens))

    def _new_report(self) -> Report:
        o = self.options
        return Report(
            model=self.model_name,
            recipe=self.recipe.name,
            seed=o.seed,
            versions=versions(),
            calibration={"source": o.calibration, "samples": o.samples, "length": o.length},
        )

    def _files(
        self, dense: BlockwiseModel, schemes: dict[str, Scheme], writer: CheckpointWriter, report: Report
    ) -> dict[str, str]:
        config = dict(self.checkpoint.config)
        if schemes:
            linears = [name for name, module in dense.model.named_modules() if isinstance(module, nn.Linear)]
            config["quantization_config"] = quantization_config(schemes, linears)
        return {
            "config.json": _json(config),
            "recipe.yaml": self.recipe.to_yaml(),
            RECORD: _json(self._record(writer, report)),
        }

    def _record(self, writer: CheckpointWriter, report: Report) -> dict[str, Any]:
        """What the folder says about itself: pattern and counts per matrix, versions, seed, hashes."""
        sparsity = self.recipe.sparsity
        return {
            "model": self.model_name,
            "recipe": {"name": self.recipe.name, "hash": self.recipe.hash},
            "command": self.command,
            "seed": self.options.seed,
            "versions": report.versions,
            "calibration": report.calibration,
            "pattern": str(sparsity) if sparsity else "dense",
            "matrices": {
                m.name: {"shape": list(m.shape), "zeros": m.zeros, "bits": m.bits}
                for b in report.blocks
                for m in b.matrices
            },
            "sha256": writer.hashes,
        }


def _json(tree: object) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _device(wanted: str) -> str:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("no CUDA device is available", "--device cuda", "use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu"


def _dtype(wanted: str, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """float32 where it is asked for, stored, or cheap; float16 weights are computed in float32 on a CPU."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    stored = checkpoint.dtype
    parameters = sum(info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values())
    if device == "cpu" and (parameters < SMALL_MODEL or stored != torch.bfloat16):
        return torch.float32
    return stored
