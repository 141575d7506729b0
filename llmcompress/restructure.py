"""A dense checkpoint with smaller matrices: what a recipe's structured step leaves for the walk over the blocks.

Three passes over the model, one block in memory at a time: find which rows and columns belong together, take gradients
and score the groups, write the smaller blocks. Every block is seen to compute what the old one computes with its groups
zeroed before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmcompress.core.structure import Kept, StructuredMethod
from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.companions import COMPANIONS, REMOTE_CODE
from llmcompress.model.checkpoint import Checkpoint, require_finite
from llmcompress.model.coupling import Coupling, changed_network, find_couplings, removal_error, tolerance
from llmcompress.model.gradients import Gradient, block_gradients
from llmcompress.model.load import Block, BlockwiseModel
from llmcompress.model.matrix import MatrixView, is_matrix
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import BlockReport, MatrixReport
from llmcompress.suspend import gates

#: tokens on which removing is compared with zeroing
PROBE_TOKENS = 16


def couplings(model: BlockwiseModel, targets: Callable[[str], bool]) -> list[Coupling]:
    """The kinds of groups that can be removed from matrices that are all targeted.

    Raises:
        UserError: there is none.
    """
    with torch.no_grad(), gates([block.module for block in model.blocks]):
        (probe,) = model.start_forwards([_probe_tokens(model)])
        found = find_couplings(model, model.load_block(0), probe.call)
        model.release_block(0)
        model.release_embeddings()
    wanted = [c for c in found if all(targets(f"{b.name}.{part.matrix}") for b in model.blocks for part in c.parts)]
    if not wanted:
        raise UserError("of each kind of group it could remove a matrix is not targeted",
                        "targets", "widen targets.include or targets.exclude")  # fmt: skip
    return wanted


def block_weights(model: BlockwiseModel) -> int:
    """Weights of the matrices of one block; blocks with groups to remove are all alike."""
    return sum(m.get_parameter("weight").numel() for m in model.blocks[0].module.modules() if is_matrix(m))


def restructure(
    model: BlockwiseModel,
    method: StructuredMethod,
    targets: Callable[[str], bool],
    tokens: Tensor,
    writer: CheckpointWriter,
    progress: Progress,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Scores, chooses, and writes the smaller checkpoint.

    Args:
        model: dense, its blocks not loaded.
        method: scores and chooses.
        targets: whether a matrix may be changed.
        tokens: (N, T) calibration rows.
        writer: entered; it is sealed here and never published.
        progress: where to show it.

    Returns:
        The smaller checkpoint, in a hidden folder that is gone when ``writer`` is left, and figures for the report.

    Raises:
        UserError: nothing can be removed, or removing is not the same as zeroing somewhere.
    """
    with progress.phase("finding coupled groups", 1):
        found = couplings(model, targets)
    rows = tokens[: method.samples, : method.length]
    with progress.phase("scoring groups", 2 * len(model.blocks), "block") as advance:
        scores = score_groups(model, method, found, rows, advance)
    kept = method.choose([c.kind for c in found], scores, block_weights(model))
    changes = {k: v for c, stays in zip(found, kept, strict=True) for k, v in c.changes(stays.groups.shape[1]).items()}
    with progress.phase("removing groups", len(model.blocks), "block") as advance:
        _write_blocks(model, list(zip(found, kept, strict=True)), changes, writer, advance)
    copy_rest(model, writer)
    config = json.dumps(_config(model, changes), indent=2)
    writer.seal({"config.json": config}, model.checkpoint.folder, COMPANIONS + REMOTE_CODE)
    return Checkpoint(writer.partial), _figures(model, method, kept, rows)


def copy_rest(model: BlockwiseModel, writer: CheckpointWriter) -> None:
    """Writes every tensor outside the blocks as it is, in the background; the writer's next calls raise a UserError if
    one holds a NaN or an infinity."""
    checkpoint = model.checkpoint
    for names in checkpoint.in_chunks(model.rest_sources()):
        nbytes = sum(checkpoint.tensors[name].nbytes for name in names)
        writer.add_unread(names, nbytes, partial(_read_finite, checkpoint, names))


def _read_finite(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    tensors = checkpoint.read(names)
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    return tensors


def copy_blocks(model: BlockwiseModel, writer: CheckpointWriter) -> list[BlockReport]:
    """Writes the blocks as they are; returns what they consist of."""
    reports = []
    bits: float = 8 * model.checkpoint.dtype.itemsize
    for index, block in enumerate(model.blocks):
        writer.add(model.checkpoint.read(model.block_sources(index)))
        views = [MatrixView(f"{block.name}.{n}", m) for n, m in block.module.named_modules() if is_matrix(m)]
        reports.append(BlockReport(block.name, matrices=[MatrixReport(v.name, v.shape, 0.0, bits) for v in views]))
    return reports


def removable(model: BlockwiseModel, recipe: Recipe) -> float:
    """The share of the blocks' weights that a recipe's structured step will remove, to one step of the widths, which
    follow from the scores.

    Raises:
        UserError: nothing can be removed, or not so much.
    """
    if recipe.structured is None:
        return 0.0
    kinds = [c.kind for c in couplings(model, recipe.targets)]
    equal = [torch.zeros(1, kind.count) for kind in kinds]
    kept = recipe.structured.choose(kinds, equal, block_weights(model))
    return sum(k.removed_weights for k in kept) / block_weights(model)


def hidden_bytes(recipe: Recipe, model: BlockwiseModel, recover_steps: int) -> int:
    """Of the checkpoints that lie beside the output while a structured recipe runs, at most."""
    return model.checkpoint.size_bytes * (1 + (recover_steps > 0)) if recipe.structured else 0


def score_groups(
    model: BlockwiseModel,
    method: StructuredMethod,
    found: list[Coupling],
    rows: Tensor,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Tensor]:
    """(blocks, groups) float32 importance of each kind of group, from the gradients on (N, T) ``rows``."""
    scores = [torch.zeros(len(model.blocks), c.kind.count) for c in found]
    parameters = _scored_parameters(model, found)
    for index, block, gradients in block_gradients(model, rows, parameters, method.needs_squares, advance):
        for coupling, score in zip(found, scores, strict=True):
            for part in coupling.parts:
                lines = _saliency(method, block, part.matrix, part.axis, gradients).cpu()
                score[index] += lines[part.index].sum(1)
            if not bool(score[index].isfinite().all()):
                raise UserError("the gradients are not finite", block.name, "try --dtype float32")
    return scores


def _scored_parameters(model: BlockwiseModel, found: list[Coupling]) -> list[str]:
    block = model.blocks[0].module
    names = [f"{part.matrix}.weight" for c in found for part in c.parts]
    biases = [f"{part.matrix}.bias" for c in found for part in c.parts if part.axis == 0]
    have = {name for name, _ in block.named_parameters()}
    return names + [name for name in biases if name in have]


def _saliency(method: StructuredMethod, block: Block, matrix: str, axis: int, gradients: dict[str, Gradient]) -> Tensor:
    """Of a matrix's rows (with their entries of the bias) or columns."""
    transposed = MatrixView(matrix, block.module.get_submodule(matrix)).transposed
    total = torch.zeros(())
    for attribute in ("weight", "bias"):
        gradient = gradients.get(f"{matrix}.{attribute}")
        if gradient is None or (attribute == "bias" and axis == 1):
            continue
        value = block.module.get_parameter(f"{matrix}.{attribute}").detach().float()
        squares = gradient.squares
        lay = partial(_as_rows, transposed=transposed)
        found = method.saliency(lay(value), lay(gradient.mean), None if squares is None else lay(squares), axis)
        total = found + total.to(value.device)
    return total


def _as_rows(value: Tensor, transposed: bool) -> Tensor:
    """A weight as (out, in), a bias as (out, 1)."""
    if value.dim() == 1:
        return value[:, None]
    return value.T if transposed else value


@torch.no_grad()
def _write_blocks(
    model: BlockwiseModel, removals: list[tuple[Coupling, Kept]], changes: dict[str, int],
    writer: CheckpointWriter, advance: Callable[[int], None],
) -> None:  # fmt: skip
    network = changed_network(model, changes)
    if network is None:
        raise UserError(f"its configuration refuses {changes}", type(model.model).__name__, "use another sparsity")
    with gates([block.module for block in model.blocks]):
        (probe,) = model.start_forwards([_probe_tokens(model)])
        for index in range(len(model.blocks)):
            block = model.load_block(index)
            here = [(coupling, kept.groups[index]) for coupling, kept in removals]
            error = removal_error(model, network, block, probe.call, here)
            if not error <= tolerance(model.dtype):
                raise UserError(
                    f"removing groups is not the same as zeroing them (outputs differ by {error:.1e})", block.name,
                    "this architecture cannot be pruned by structure",
                )  # fmt: skip
            probe.resume()
            writer.add(_smaller_tensors(model, index, here))
            model.release_block(index)
            advance(1)
    model.release_embeddings()


def _smaller_tensors(model: BlockwiseModel, index: int, removals: list[tuple[Coupling, Tensor]]) -> dict[str, Tensor]:
    """The block's tensors by name on disk, in the stored dtype, without the groups that go."""
    block = model.blocks[index]
    tensors = model.checkpoint.read(model.block_sources(index))
    for parameter, _ in block.module.named_parameters():
        name = model.disk_name(f"{block.name}.{parameter}")
        owner = parameter.rpartition(".")[0]
        module = block.module.get_submodule(owner)
        transposed = is_matrix(module) and MatrixView(owner, module).transposed
        for coupling, groups in removals:
            tensors[name] = coupling.reduced(parameter, tensors[name], groups, transposed)
    return tensors


def _config(model: BlockwiseModel, changes: dict[str, int]) -> dict[str, Any]:
    """The model's own ``config.json`` with the new widths, under no second name."""
    aliases = {alias for alias, key in model.model.config.attribute_map.items() if key in changes and alias != key}
    return {k: v for k, v in model.checkpoint.config.items() if k not in aliases} | changes


def _figures(model: BlockwiseModel, method: StructuredMethod, kept: list[Kept], rows: Tensor) -> dict[str, Any]:
    return {
        "target": method.sparsity,
        "achieved": sum(k.removed_weights for k in kept) / block_weights(model),
        "gradients on": {"samples": rows.shape[0], "length": rows.shape[1]},
        "kept per block": {k.kind.name: [k.groups.shape[1], k.kind.count] for k in kept},
    }


def _probe_tokens(model: BlockwiseModel) -> Tensor:
    return torch.arange(PROBE_TOKENS)[None] % model.model.config.get_text_config().vocab_size
