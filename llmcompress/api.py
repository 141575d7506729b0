"""The program in four functions: compress a checkpoint, plan that, load the result, evaluate it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmcompress.calibration import NONE
from llmcompress.errors import UserError
from llmcompress.evaluate.evaluation import EvalOptions, EvaluationRun
from llmcompress.evaluate.result import Evaluation
from llmcompress.export.destination import check_output
from llmcompress.model.locate import short_name
from llmcompress.needs import first_that_reads
from llmcompress.options import Options
from llmcompress.plan import BASE_BYTES, Plan, make_plan, without_misfits
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.recover import recovery_bytes
from llmcompress.report import Report
from llmcompress.run import Run
from llmcompress.runtime.loading import load
from llmcompress.source import Source

__all__ = ["EvalOptions", "Options", "compress", "evaluate", "load", "plan"]


def compress(
    model: str | Path,
    recipe: str | Path | Recipe = "jsq",
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
    resume: bool = False,
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
        force: replace an output this program wrote before, and discard an unfinished run.
        resume: go on with a run that was killed or interrupted, whose state is in ``<output>.partial``.
        progress: where to show it; None is silent.
        command: the command line, for the record.

    Returns:
        The report that is also saved as ``report.json``.

    Raises:
        UserError: bad input; nothing has been written then. A `Fault` of the machine, such as a full disk, leaves what
            ``resume`` goes on with.
    """
    options = options or Options()
    source, recipe, target = _prepare(model, recipe, output, options, overrides, force or resume)
    with progress or Progress(silent=True) as shown:
        return Run(source, recipe, options, shown, command).execute(target, force, resume)


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
    options = options or Options()
    source, recipe, _ = _prepare(model, recipe, output, options, overrides, force)
    dense = source.open()
    left_dense: list[str] = []
    if options.on_misfit == "skip":
        recipe, left_dense = without_misfits(recipe, dense)
    found = make_plan(dense, recipe, options.rows, options.length)
    found.notes += left_dense
    if options.recover_steps:
        found.peak_memory_bytes = max(found.peak_memory_bytes, BASE_BYTES + recovery_bytes(dense, options.recover))
    return found


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    progress: Progress | None = None,
    command: str = "",
) -> Evaluation:
    """What a model is worth on texts and tasks, alone or beside the model it was made from.

    Args:
        model: preset, folder or Hub id; inputs of quantized matrices are rounded as at run time.
        reference: the same, for KL, agreement and paired tests.
        options: texts, tasks, windows, arithmetic; ``EvalOptions(texts=("held-out.txt",))``.
        progress: where to show it; None is silent.
        command: the command line, for the record.

    Raises:
        UserError: bad input, before any forward.
    """
    run = EvaluationRun(model, reference, options or EvalOptions())
    with progress or Progress(silent=True) as shown:
        return run.execute(shown, command)


def _prepare(
    model: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path | None,
    options: Options,
    overrides: Iterable[str],
    force: bool,
) -> tuple[Source, Recipe, Path]:
    """Everything that can be refused, in the order of its cost: the recipe and the output folder before the model."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    target = Path("compressed") / f"{short_name(str(model))}-{recipe.name}" if output is None else Path(output)
    check_output(target, force)
    if options.recover_steps and recipe.structured is None:
        raise UserError("the recipe has no step that makes matrices smaller, so there is nothing to recover",
                        "--recover-steps", "leave it out, or use e.g. --recipe llm-pruner-20")  # fmt: skip
    if options.calibration == NONE and (step := first_that_reads(recipe)):
        raise UserError(f"{step} reads calibration rows, and there are none", f"recipe {recipe.name}",
                        "give --calibration self or a text")  # fmt: skip
    source = Source(model, options)
    check_output(target, force, source.folder)
    return source, recipe, target
