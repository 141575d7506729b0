"""What a run would do, found out without doing it: blocks, input groups, folds, memory and bytes on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace

from llmcompress.annealing import number_of_moves
from llmcompress.core.structure import StructuredMethod
from llmcompress.errors import UserError
from llmcompress.export.floats import unloadable
from llmcompress.export.quantized import (
    PACK_QUANTIZED,
    Scheme,
    experts_note,
    loadable,
    storage_format,
    storage_note,
    stored_bits_per_weight,
    uncontained,
    unsupported,
)
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.matrix import MatrixView, is_matrix
from llmcompress.needs import samples_needed
from llmcompress.recipe import Recipe
from llmcompress.recompress import affordable_interval, kept_bytes
from llmcompress.rehearsal import spans
from llmcompress.restructure import removable
from llmcompress.sensitivity import judging_share, unsettled
from llmcompress.survey import PlannedGroup, group_lines, planned, survey

#: interpreter, libraries and allocator slack, measured
BASE_BYTES = 700 * 2**20


@dataclass
class Plan:
    """What `--dry-run` prints.

    Attributes:
        steps: of the recipe, in order, each with its method.
        rows: of the calibration that the steps read, and tokens per row.
        blocks: by block name, its input groups.
        share: of the blocks' weights, what will be compressed.
        peak_memory_bytes: predicted high-water mark of the process.
        size_bytes: before, and predicted after.
        notes: what will be stored otherwise than the recipe's bits suggest.
    """

    steps: list[str] = field(default_factory=list)
    rows: tuple[int, int] = (0, 0)
    blocks: dict[str, list[PlannedGroup]] = field(default_factory=dict)
    share: float = 0.0
    peak_memory_bytes: int = 0
    size_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        return asdict(self)

    def text(self) -> str:
        """For the terminal."""
        lines = group_lines(self.blocks)
        lines += [
            f"steps        {', '.join(self.steps)}",
            f"calibration  {self.rows[0]} × {self.rows[1]} tokens",
            f"compressed   {self.share:.1%} of the blocks' weights",
            f"memory       about {self.peak_memory_bytes / 2**30:.2f} GiB at the peak",
            f"on disk      {_mib(self.size_bytes['before'])} → about {_mib(self.size_bytes['after'])}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def make_plan(model: BlockwiseModel, recipe: Recipe, samples: int, length: int) -> Plan:
    """Runs a few tokens through the model, block by block, to find groups and folds."""
    walked = recipe.blockwise
    targeted = set(check_fit(walked, model))
    removed = removable(model, recipe)
    plan = Plan(size_bytes={"before": model.checkpoint.size_bytes, "after": estimate_size(model, walked, removed)})
    plan.steps = [f"{stage.kind} ({stage.method_name})" for stage in recipe.stages]
    plan.rows = (samples if recipe.structured else samples_needed(walked, samples, length), length)
    compressed = total = 0
    largest_block = widest = 0
    for block, found in survey(model):
        plan.blocks[block.name] = [planned(g, targeted) for g in found.groups]
        sizes = {m.name: m.shape[0] * m.shape[1] for g in found.groups for m in g.matrices}
        compressed += sum(size for name, size in sizes.items() if name in targeted)
        total += found.parameters
        largest_block = max(largest_block, found.parameters)
        widest = max(widest, *(g.width for g in found.groups))
    plan.share = compressed / total
    plan.notes = _notes(walked, model)
    plan.peak_memory_bytes = _estimate_memory(model, walked, largest_block, widest, samples * length)
    if moves := number_of_moves(walked):
        _plan_search(plan, moves, model, samples * length)
    if unsettled(walked):
        _plan_sensitivity(plan, model, samples * length)
    if recipe.structured is not None:
        gradients = _gradient_memory(model, recipe.structured, largest_block)
        plan.peak_memory_bytes = max(plan.peak_memory_bytes, gradients)
        plan.notes.insert(
            0, f"{removed:.1%} of the blocks' weights are removed first; widths above are the dense model's"
        )
    return plan


def _plan_search(plan: Plan, moves: int, model: BlockwiseModel, tokens: int) -> None:
    """Adds what a search over whole compressions keeps in memory, and how many of them it may take."""
    every = affordable_interval(model, tokens)
    kept = kept_bytes(model, tokens, every)
    plan.peak_memory_bytes += kept
    plan.notes.append(
        f"annealing of the clip ratios: at most {moves + 1} compressions of the model before the one that is written; "
        f"{_mib(kept)} keep what enters {'each block' if every == 1 else f'every {every}th block'}"
    )


def _plan_sensitivity(plan: Plan, model: BlockwiseModel, tokens: int) -> None:
    """Adds what finding the blocks' ratios keeps in memory, and how much work it is."""
    hidden = model.model.config.get_text_config().hidden_size
    judging = round(judging_share(tokens) * tokens)
    kept = (len(model.blocks) + 1) * judging * hidden * model.dtype.itemsize
    plan.peak_memory_bytes += kept
    plan.notes.append(
        f"sparsity by sensitivity: two passes over the model before the one that is written, {judging} tokens judge "
        f"{2 * len(model.blocks)} models side by side; {_mib(kept)} keep them"
    )


def misfits(recipe: Recipe, model: BlockwiseModel) -> dict[str, str]:
    """Why a pattern or group of the recipe does not divide the width of a matrix, by its name."""
    recipe = recipe.sparing(model.routers)
    found = {}
    for view in _matrices(model):
        reasons = [misfit for method in recipe.methods if (misfit := method.misfit(view.shape[1]))]
        if reasons and recipe.targets(view.name):
            found[view.name] = reasons[0]
    return found


def without_misfits(recipe: Recipe, model: BlockwiseModel) -> tuple[Recipe, list[str]]:
    """The recipe for the matrices it fits, and a warning for each of the others.

    Raises:
        UserError: it fits none.
    """
    found = misfits(recipe.blockwise, model)
    spared = replace(recipe, exclude=(*recipe.exclude, *_patterns(found, model))) if found else recipe
    if found and not any(spared.targets(view.name) for view in _matrices(model)):
        raise UserError(f"{next(iter(found.values()))}, and so for every matrix", f"recipe {recipe.name}",
                        "use another pattern or group")  # fmt: skip
    return spared, [f"{name}: left dense, {misfit}" for name, misfit in found.items()]


def _patterns(names: Collection[str], model: BlockwiseModel) -> list[str]:
    """What names these matrices alone, as short as can be: ``*.down_proj`` where all of that name are among them."""
    kept = {view.name.rpartition(".")[2] for view in _matrices(model) if view.name not in names}
    kinds = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if kind in kept else f"*.{kind}" for name, kind in kinds.items()})


def check_fit(recipe: Recipe, model: BlockwiseModel) -> dict[str, tuple[int, int]]:
    """Names and shapes (out, in) of the matrices a recipe will compress.

    Raises:
        UserError: a pattern or group does not divide a width, nothing is targeted, or the result could not be loaded.
    """
    recipe = recipe.sparing(model.routers)
    views = [view for view in _matrices(model) if recipe.targets(view.name)]
    for name, misfit in misfits(recipe, model).items():
        raise UserError(misfit, name, "or leave such matrices dense: --on-misfit skip")
    shares = [last - first for first, last in spans(model, recipe.targets)]
    for method in recipe.methods:
        if misfit := method.misfit_blocks(shares):
            raise UserError(misfit, f"recipe {recipe.name}: {method.stage}", "give one value per block that suits it")
    scheme = _scheme(recipe, model)
    if scheme and not model.unpacks and storage_format(scheme).endswith(PACK_QUANTIZED):
        raise UserError("transformers cannot load packed weights of this architecture", type(model.model).__name__,
                        "use another grid, such as int4-g128")  # fmt: skip
    for method in recipe.methods if views else ():
        if misnamed := method.misnamed([view.name for view in views if not unsupported(type(view.module))]):
            raise UserError(misnamed, type(model.model).__name__, "write the pattern of its name, such as '*.query'")
    inputs = any(getattr(method, "activations", None) for method in recipe.methods)
    if recipe.grid and inputs and (why := uncontained(recipe.grid)):
        raise UserError(why, f"recipe {recipe.name}: quantize", "leave activations out, and weights are stored dense")
    if (grid := recipe.grid) and (why := unloadable(grid, model.checkpoint.dtype)):
        raise UserError(why, f"recipe {recipe.name}: quantize", "use fp8, or a bfloat16 checkpoint")
    if not views:
        raise UserError("no matrix is targeted", f"recipe {recipe.name}", "widen targets.include or targets.exclude")
    return {view.name: view.shape for view in views}


def estimate_size(model: BlockwiseModel, recipe: Recipe, removed: float = 0.0) -> int:
    """Predicted bytes of the result's tensors, if a share ``removed`` of the blocks' weights is gone beforehand."""
    saved, recipe = 0.0, recipe.sparing(model.routers)
    scheme, dtype = _scheme(recipe, model), model.checkpoint.dtype
    for view in _matrices(model) if scheme else ():
        if scheme and recipe.targets(view.name) and not unsupported(type(view.module)):
            rows, columns = view.shape
            saved += rows * columns * (8 * dtype.itemsize - stored_bits_per_weight(scheme, columns, dtype)) / 8
    matrices = sum(view.shape[0] * view.shape[1] for view in _matrices(model)) * dtype.itemsize
    return model.checkpoint.size_bytes - int(saved) - int(removed * (matrices - saved))


def _scheme(recipe: Recipe, model: BlockwiseModel) -> Scheme | None:
    """How matrices will be stored; None if they are not quantized."""
    steps = [method for method in recipe.methods if method.stage == "quantize"]
    if not steps or not recipe.grid or uncontained(recipe.grid):
        return None
    activations = getattr(steps[-1], "activations", None)
    outputs = activations if getattr(steps[-1], "quantize_outputs", ()) else None
    return loadable(Scheme(recipe.grid, activations, outputs), model.unpacks)


def _notes(recipe: Recipe, model: BlockwiseModel) -> list[str]:
    scheme, grid = _scheme(recipe, model), recipe.grid
    if grid is None:
        return []
    refused = {unsupported(type(view.module), grid) for view in _matrices(model) if recipe.targets(view.name)} - {""}
    dense = [f"rounded weights are stored dense and inputs are not rounded, {why}" for why in sorted(refused)]
    if scheme is None:
        return dense
    noted = [storage_note(scheme)] if storage_note(scheme) else []
    if experts_note(scheme) and any(model.merges_expert(v.name) for v in _matrices(model) if recipe.targets(v.name)):
        noted.append(experts_note(scheme))
    return noted + dense


def _gradient_memory(model: BlockwiseModel, method: StructuredMethod, block: int) -> int:
    """Embeddings, head, a block with its gradients in float32 twice (and their squares), and what enters each block."""
    item = model.dtype.itemsize
    inside = {id(p) for b in model.blocks for p in b.module.parameters()}
    resident = sum(p.numel() for p in model.model.parameters() if id(p) not in inside) * item
    hidden = model.model.config.get_text_config().hidden_size
    entering = len(model.blocks) * method.samples * method.length * hidden * item
    return BASE_BYTES + resident + entering + block * (item + 8 + 8 * method.needs_squares)


def _estimate_memory(model: BlockwiseModel, recipe: Recipe, block: int, width: int, tokens: int) -> int:
    """Resident weights, one block and the float32 copies of half of it, the live activations of all micro-batches,
    and a Gram matrix of the widest input if a step wants it."""
    item = model.dtype.itemsize
    head = model.model.get_output_embeddings()
    inside = {id(p) for b in model.blocks for p in b.module.parameters()} | {id(p) for p in head.parameters()}
    resident = sum(p.numel() for p in model.model.parameters() if id(p) not in inside) * item
    hidden = model.model.config.get_text_config().hidden_size
    live = tokens * (2 * hidden + 2 * width) * item + tokens * width * 4 * any(
        "rows" in m.needs for m in recipe.methods
    )
    gram = 3 * 4 * width**2 if any("gram" in m.needs for m in recipe.methods) else 0
    return BASE_BYTES + resident + block * (item + 8) + live + gram


def _matrices(model: BlockwiseModel) -> list[MatrixView]:
    """Every matrix inside the blocks."""
    return [
        MatrixView(f"{block.name}.{name}", module)
        for block in model.blocks
        for name, module in block.module.named_modules()
        if is_matrix(module)
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
