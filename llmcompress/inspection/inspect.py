"""All of it: the files, the matrices one at a time, what the folder says of itself, and a few tokens sent through.

Nothing larger than a matrix, or a block while the tokens pass it, is in memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from llmcompress.arithmetic import choose_dtype
from llmcompress.errors import UserError
from llmcompress.export.destination import RECORD, refuse_packed
from llmcompress.export.quantized import experts_note
from llmcompress.export.rewriting import CONVERTED
from llmcompress.inspection.claims import (
    check_grids,
    check_report,
    check_total_sparsity,
    read_claims,
    read_recipe,
)
from llmcompress.inspection.figures import MatrixFigures
from llmcompress.inspection.files import check_files, check_total_size, read_json
from llmcompress.inspection.stored import StoredMatrix, matrices_of
from llmcompress.inspection.values import Claim, inspect_matrix
from llmcompress.inspection.verdict import Verdict
from llmcompress.model.checkpoint import Checkpoint, require_finite
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe
from llmcompress.survey import PlannedGroup, planned, survey


@dataclass
class Inspection:
    """What is in a folder, and whether it is what the folder says.

    Attributes:
        folder: that was looked at.
        compressed: whether it has a record of this program, or a quantization_config.
        size_bytes: of all tensors.
        matrices: figures of each that decodes, block by block; those outside the blocks last.
        blocks: input groups by block; empty if no forward was possible.
        verdict: what holds and what does not.
    """

    folder: str
    compressed: bool = False
    size_bytes: int = 0
    matrices: list[MatrixFigures] = field(default_factory=list)
    blocks: dict[str, list[PlannedGroup]] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def holds(self) -> bool:
        """Nothing was found to be wrong."""
        return not self.verdict.wrong

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "folder": self.folder,
            "holds": self.holds,
            "compressed": self.compressed,
            "size_bytes": self.size_bytes,
            "matrices": [asdict(figures) for figures in self.matrices],
            "blocks": {name: [asdict(group) for group in groups] for name, groups in self.blocks.items()},
            "held": dict(self.verdict.held),
            "unchecked": self.verdict.unchecked,
            "wrong": [asdict(finding) for finding in self.verdict.wrong],
        }


def inspect(
    folder: Path, trust_remote_code: bool = False, advance: Callable[[str], None] = lambda what: None
) -> Inspection:
    """Looks at a checkpoint folder and verifies what it says.

    Args:
        folder: with config.json and safetensors.
        trust_remote_code: run code that came with the checkpoint.
        advance: told what is being looked at.

    Raises:
        UserError: not a folder with config.json and safetensors, or a format that is not read at all.
    """
    found = Inspection(str(folder))
    verdict = found.verdict
    _require_checkpoint(folder)
    record = read_json(folder / RECORD, "record", verdict)
    hashes = (record or {}).get("sha256")
    if record is not None and not isinstance(hashes, dict):
        verdict.fail("record", RECORD, "has no hashes")
    advance("files")
    readable = check_files(folder, hashes if isinstance(hashes, dict) else {}, verdict)
    found.compressed = record is not None
    if not readable:
        verdict.skip("the tensors: not all shards can be read")
        return found
    try:
        checkpoint = Checkpoint(folder)
    except UserError as error:
        verdict.fail("files", folder.name, str(error))
        return found
    found.size_bytes = checkpoint.size_bytes
    found.compressed |= bool(checkpoint.config.get("quantization_config"))
    check_total_size(folder, found.size_bytes, verdict)
    advance("transformers")
    model = _skeleton(checkpoint, trust_remote_code, verdict)
    _load_as_others_do(checkpoint, model, trust_remote_code, verdict)
    converted = (record or {}).get(CONVERTED)
    if converted:
        verdict.skip(f"zeros, masks, recipe and report: they stayed with the folder that was converted to {converted}")
        record = None
    recipe = read_recipe(folder, record, verdict) if record is not None else None
    claims = read_claims(record, recipe, verdict) if record is not None else {}
    _inspect_tensors(found, checkpoint, model, claims, recipe, advance)
    if record is not None:
        _check_record(found, folder, record, claims)
    elif found.compressed and not converted:
        _note_foreign(checkpoint.config["quantization_config"], verdict)
        verdict.skip(f"hashes, zeros, masks, recipe and report: no record ({RECORD}) says what they should be")
    if model is not None:
        _send_tokens(found, model, advance)
    return found


def _require_checkpoint(folder: Path) -> None:
    refuse_packed(folder)
    if not (folder / "config.json").is_file():
        raise UserError("no config.json", str(folder), "give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors*")):
        Checkpoint(folder)  # says why there are none


def _inspect_tensors(
    found: Inspection,
    checkpoint: Checkpoint,
    model: BlockwiseModel | None,
    claims: dict[str, Claim],
    recipe: Recipe | None,
    advance: Callable[[str], None],
) -> None:
    """Matrix by matrix, and then everything else tensor by tensor."""
    verdict = found.verdict
    try:
        matrices = matrices_of(checkpoint, model)
    except UserError as error:
        verdict.skip(f"matrices: {error}")
        return
    for matrix in matrices:
        advance(matrix.name)
        figures = inspect_matrix(matrix, checkpoint, claims.get(matrix.name), verdict)
        if figures is not None:
            found.matrices.append(figures)
    for name in sorted(claims.keys() - {m.name for m in matrices}):
        verdict.fail("record", name, f"{RECORD} lists it, but no tensor holds it")
    if recipe is not None and model is not None:
        check_grids(recipe, model.schemes, claims, verdict)
    elif recipe is not None:
        verdict.skip("quantization_config against the recipe: the model cannot be built")
    _note_dense_grids(matrices, claims, recipe, verdict)
    seen = {name for matrix in matrices for name in matrix.parts.values()}
    for name in checkpoint.tensors:
        if name not in seen:
            try:
                require_finite(name, checkpoint.read([name])[name])
                verdict.held["finite"] += 1
            except UserError as error:
                verdict.fail("finite", name, error.what)


def _note_dense_grids(
    matrices: list[StoredMatrix], claims: dict[str, Claim], recipe: Recipe | None, verdict: Verdict
) -> None:
    dense = sum(m.name in claims and m.scheme is None for m in matrices)
    if recipe is not None and recipe.grid is not None and dense:
        verdict.skip(f"the grid of {dense} matrices that are rounded and stored dense: their scales are not stored")


def _check_record(found: Inspection, folder: Path, record: dict[str, Any], claims: dict[str, Claim]) -> None:
    verdict = found.verdict
    check_report(folder, record, claims, found.size_bytes, verdict)
    claimed = [f for f in found.matrices if f.name in claims]
    if claimed and record.get("pattern") not in (None, "dense"):
        try:
            check_total_sparsity(record["pattern"], claimed, verdict)
        except UserError as error:
            verdict.fail("record", f"{RECORD}: pattern", error.what)


def _note_foreign(config: object, verdict: Verdict) -> None:
    """What other programs write into quantization_config and this one does not verify."""
    for key in ("sparsity_config", "kv_cache_scheme", "transform_config"):
        if isinstance(config, dict) and config.get(key):
            verdict.skip(f"{key} of quantization_config: {config[key]}")


def _load_as_others_do(
    checkpoint: Checkpoint, model: BlockwiseModel | None, trust_remote_code: bool, verdict: Verdict
) -> None:
    """Whether plain transformers finds a tensor of the right shape for every parameter. Nothing is read into memory."""
    if model is not None:
        stacked = {experts_note(s) for name, s in model.schemes.items() if model.merges_expert(name)} - {""}
        if stacked:
            verdict.skip(f"whether transformers loads it: {'; '.join(sorted(stacked))}")
            return
    said = checkpoint.config.get("quantization_config")
    method = said.get("quant_method", "compressed-tensors") if isinstance(said, dict) else "compressed-tensors"
    if checkpoint.config.get("auto_map") and not trust_remote_code:
        verdict.skip(
            "whether transformers loads it: it comes with code of its own, and --trust-remote-code is not given"
        )
        return
    try:
        with redirect_stderr(io.StringIO()):  # its progress bars
            _, told = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, device_map="meta", output_loading_info=True, local_files_only=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    except Exception as error:  # whatever transformers and its quantizers raise: it is their verdict that counts
        line = " ".join(str(error).split())[:200] or type(error).__name__
        if method == "compressed-tensors":
            verdict.fail("transformers", checkpoint.folder.name, f"does not load: {line}")
        else:
            verdict.skip(f"whether transformers loads it: {line}")
        return
    for key, what in (("missing_keys", "has no tensor"), ("mismatched_keys", "has a tensor of another shape")):
        for name in sorted(map(str, told.get(key) or ())):
            verdict.fail("transformers", name, what)
    unexpected = sorted(map(str, told.get("unexpected_keys") or ()))
    if unexpected:
        verdict.skip(f"{len(unexpected)} tensors that transformers does not use, such as {unexpected[0]}")
    verdict.held["transformers"] += not any(finding.check == "transformers" for finding in verdict.wrong)


def _skeleton(checkpoint: Checkpoint, trust_remote_code: bool, verdict: Verdict) -> BlockwiseModel | None:
    try:
        return BlockwiseModel(checkpoint, choose_dtype("auto", checkpoint, "cpu"), "cpu", trust_remote_code)
    except UserError as error:
        verdict.skip(f"input groups and folds: {error}")
        return None


def _send_tokens(found: Inspection, model: BlockwiseModel, advance: Callable[[str], None]) -> None:
    try:
        for block, groups in survey(model):
            advance(block.name)
            names = {m.name for group in groups.groups for m in group.matrices}
            found.blocks[block.name] = [planned(group, names) for group in groups.groups]
    except UserError as error:
        found.verdict.skip(f"input groups and folds: {error}")
    except (RuntimeError, KeyError, TypeError, ValueError) as error:  # tensors that do not fit together
        found.verdict.skip(f"input groups and folds: {' '.join(str(error).split())[:160]}")
    model.release_embeddings()
