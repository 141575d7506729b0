"""Compresses a tiny random model of every architecture in `tests.architectures`, and tells how each came back.

    python -m scripts.architectures
    python -m scripts.architectures --only mixtral gpt_oss          # renews these rows
    python -m scripts.architectures --only mixtral gpt_oss --print  # shows them

Three recipes each: `jsq` (W8A8, half of the weights zero), `gptq-w4a16` (groups of 8, as the models are 32 wide) and
smoothing alone, whose result must compute what the dense model computes. The folder is read by plain transformers
(``AutoModelForCausalLM.from_pretrained``) and its logits are compared with ours. Where transformers rounds inputs
otherwise, both are compared without rounded inputs; where it cannot load the folder, its tensors are decoded by
compressed-tensors into a dense checkpoint, which transformers reads."""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress import Recipe, compress
from llmcompress.api import Options
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import rounded_activations
from llmcompress.export.library import library_schemes
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.report import Report
from llmcompress.suspend import gates
from tests.architectures import ALL, tiny_folder

RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "jsq": ("jsq", []),
    "gptq-w4a16": ("gptq-w4a16", ["quantize.weights=int4-g8"]),
}
SMOOTH = {"stages": [{"smooth": {}}]}
#: matrices too narrow for groups of 8
EXCLUDED = {"gemma3n_text": ["targets.exclude=['*.altup.*']"]}
#: logits further apart than this, as a share of the largest, are not the same
TOLERANCE = 1e-5
PROMPTS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))

SAME = "same logits"
INPUTS = "same weights, inputs rounded otherwise"
DECODED = "decoded by compressed-tensors"
WRONG = "differs"
REFUSED = "refused"


@dataclass
class Outcome:
    """What became of one architecture under one recipe.

    Attributes:
        verdict: one of the constants above.
        error: largest difference of the logits, as a share of the largest logit.
        share: of the blocks' weights in tensors of two axes or more, what was compressed.
        left: families of what was not.
        experts: whether it has some that transformers stacks when it loads them.
        stored_dense: matrices that were rounded but stored in floating point.
        reason: why it was refused, or transformers could not load it.
    """

    verdict: str
    error: float = 0.0
    share: float = 0.0
    left: list[str] = field(default_factory=list)
    stored_dense: int = 0
    experts: bool = False
    reason: str = ""


def examine(model_type: str, recipe: str, folder: Path) -> Outcome:
    """Compresses a tiny model into ``folder`` and reads it back in every way there is."""
    name, changes = RECIPES[recipe]
    source = tiny_folder(folder / "dense", model_type)
    try:
        report = _compress(source, Recipe.load(name, changes + EXCLUDED.get(model_type, [])), folder)
    except UserError as error:
        return Outcome(REFUSED, reason=_placeless(str(error), folder))
    return _judge(source, folder / "out", report)


def smoothing_error(model_type: str, folder: Path) -> tuple[float, int, int]:
    """How far plain transformers' logits move when everything is smoothed that can be, as a share of the largest; how
    many input groups were, and of how many."""
    source = tiny_folder(folder / "dense", model_type)
    report = _compress(source, Recipe.from_tree(SMOOTH, "smooth"), folder)
    folds = [bool(group.folded) for block in report.blocks for group in block.groups]
    return _distance(_plain(source), _plain(folder / "out")), sum(folds), len(folds)


def _compress(source: Path, recipe: Recipe, folder: Path) -> Report:
    rows = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": rows}, folder / "rows.safetensors")
    options = Options(
        calibration=str(folder / "rows.safetensors"), samples=6, length=32, evaluate=False, device="cpu"
    )  # fmt: skip
    return compress(source, recipe, folder / "out", options)


def _judge(source: Path, out: Path, report: Report) -> Outcome:
    dense = BlockwiseModel(Checkpoint(source), torch.float32)
    share, left = _share(dense, {m.name for m in report.matrices})
    schemes = BlockwiseModel(Checkpoint(out), torch.float32).schemes
    stored_dense = len([m for m in report.matrices if m.name not in schemes])
    outcome = Outcome(SAME, share=share, left=left, stored_dense=stored_dense)
    outcome.experts = any(dense.merges_expert(name) for name in schemes)
    try:
        outcome.error = _distance(_ours(out), _plain(out))
    except (RuntimeError, ValueError) as error:
        outcome.error, outcome.reason = float("inf"), " ".join(str(error).split())[:120]
    if outcome.error > TOLERANCE and not outcome.reason:
        outcome.verdict, outcome.error = INPUTS, _distance(_ours(out, rounding=False), _plain(out, rounding=False))
    if outcome.error > TOLERANCE:
        outcome.verdict, outcome.error = DECODED, _distance(_ours(out, rounding=False), _plain(_decoded(out)))
    if outcome.error > TOLERANCE:
        outcome.verdict = WRONG
    return outcome


@torch.no_grad()
def _ours(folder: Path, rounding: bool = True) -> Tensor:
    """Logits as the folder is judged."""
    model = BlockwiseModel(Checkpoint(folder), torch.float32)
    with gates([block.module for block in model.blocks]):
        (forward,) = model.start_forwards([PROMPTS], head=True)
        for index in range(len(model.blocks)):
            model.load_block(index)
            if not rounding:
                forward.resume()
                continue
            with rounded_activations(model):
                forward.resume()
    return forward.result


@torch.no_grad()
def _plain(folder: Path, rounding: bool = True) -> Tensor:
    """Logits of plain transformers, which unpacks quantized weights in a first forward."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model(PROMPTS, use_cache=False)
    for module in model.modules() if not rounding else ():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    return model(PROMPTS, use_cache=False).logits


def _decoded(folder: Path) -> Path:
    """A dense checkpoint of a quantized one, by compressed-tensors."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    tensors = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    model = BlockwiseModel(Checkpoint(folder), torch.float32)
    for name in model.schemes:
        stem = model.source_names[f"{name}.weight_scale"][0].removesuffix("weight_scale")
        (scheme,) = library_schemes(quantization, [model.stored_name(name)]).values()
        parts = {n.removeprefix(stem): tensors.pop(n) for n in list(tensors) if n.startswith(f"{stem}weight")}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        tensors[f"{stem}weight"] = compressor.decompress(parts, scheme)["weight"].to(torch.float32)
    target = folder.with_name("decoded")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _share(model: BlockwiseModel, compressed: set[str]) -> tuple[float, list[str]]:
    total = done = 0
    left: dict[str, None] = {}
    for block in model.blocks:
        for name, parameter in block.module.named_parameters(prefix=block.name):
            if parameter.dim() < 2:
                continue
            total += parameter.numel()
            if name.removesuffix(".weight") in compressed:
                done += parameter.numel()
            else:
                left[re.sub(r"\.\d+(?=\.)", "", name.removeprefix(block.name + ".")).removesuffix(".weight")] = None
    return done / total, list(left)


def _placeless(text: str, folder: Path) -> str:
    return text.replace(f"{folder}/dense: ", "").replace(str(folder), "")


def table() -> dict[str, dict[str, object]]:
    """All architectures, by model type."""
    return json.loads((RESULTS / "architectures.json").read_text(encoding="utf-8"))


def _rows(names: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    for name in names:
        row: dict[str, object] = {}
        for recipe in RECIPES:
            with tempfile.TemporaryDirectory() as folder:
                row[recipe] = asdict(examine(name, recipe, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            try:
                error, folded, groups = smoothing_error(name, Path(folder))
                row["smooth"] = {"error": error, "folded": folded, "groups": groups}
            except UserError as error:
                row["smooth"] = {"reason": _placeless(str(error), Path(folder))}
        yield name, row


def markdown(rows: dict[str, dict[str, object]]) -> str:
    """The table and a line of totals."""
    passed = [n for n, row in rows.items() if all(row[r]["verdict"] not in (REFUSED, WRONG) for r in RECIPES)]  # type: ignore[index]
    lines = [
        f"{len(passed)} of {len(rows)} architectures pass both recipes. Made by `python -m scripts.architectures` with "
        f"transformers {transformers.__version__}.",
        "",
        "| model type | `jsq` | `gptq-w4a16` | weights compressed | left dense | groups smoothed |",
        "|---|---|---|---:|---|---:|",
    ]
    notes: dict[str, int] = {}
    for name, row in rows.items():
        cells = [_cell(row[recipe], notes) for recipe in RECIPES]  # type: ignore[arg-type]
        one = next((row[r] for r in RECIPES if row[r]["verdict"] != REFUSED), None)  # type: ignore[index]
        share = f"{one['share']:.1%}" if one else ""  # type: ignore[index, call-overload]
        left = ", ".join(f"`{family}`" for family in one["left"]) if one else ""  # type: ignore[index, call-overload]
        smooth: dict[str, float] = row["smooth"]  # type: ignore[assignment]
        folded = f"{smooth['folded']:.0f}/{smooth['groups']:.0f}" if "folded" in smooth else ""
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {share} | {left} | {folded} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]) + "\n"


def _cell(outcome: dict[str, object], notes: dict[str, int]) -> str:
    verdict = str(outcome["verdict"])
    said = [str(outcome["reason"])] if verdict == REFUSED else []
    if verdict == DECODED:
        why = "experts stored in one byte a weight" if outcome["experts"] else "quantized weights of this architecture"
        said.append(f"transformers cannot load {why}; `llmcompress.load` can")
    if outcome["stored_dense"]:
        said.append("some matrices are rounded but stored in floating point: Conv1D, or experts that lie stacked")
    marks = [str(notes.setdefault(note, len(notes) + 1)) for note in said]
    return verdict + "".join(f" <sup>{mark}</sup>" for mark in marks)


def quiet() -> None:
    """No progress bars, no advice."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ALL), choices=list(ALL), metavar="TYPE")
    parser.add_argument("--print", action="store_true", help="show the table instead of writing it")
    arguments = parser.parse_args()
    quiet()
    rows = {}
    for name, row in _rows(arguments.only):
        rows[name] = row
        print(name, *(f"{r}: {row[r]['verdict']}" for r in RECIPES), sep="  ", flush=True)  # type: ignore[index]
    if arguments.print:
        print(markdown(rows))
        return
    if rows.keys() != ALL.keys():
        rows = {name: row for name, row in (table() | rows).items() if name in ALL}
    rows = {name: rows[name] for name in ALL}
    (RESULTS / "architectures.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "architectures.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
