"""Which rows and columns of a block's matrices belong together, found by asking the configuration.

A width is changed in the configuration and an empty network is built from it: the matrices whose shapes follow are the
coupled ones, whatever they are called. Whether they are coupled group by group is then measured: removing some groups
must give what zeroing them gives. Nothing else is assumed of an architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from llmcompress.core.structure import GroupKind
from llmcompress.errors import UserError
from llmcompress.model.blocks import find_blocks
from llmcompress.model.groups import Call, run_block
from llmcompress.model.load import Block, BlockwiseModel, release
from llmcompress.model.matrix import MatrixView, is_matrix

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """The share of every group in one matrix.

    Attributes:
        matrix: dotted name within the block.
        axis: 0 where groups own rows (and entries of the bias), 1 where they own columns of the weight (out, in).
        index: (groups, rows or columns of each).
    """

    matrix: str
    axis: int
    index: Tensor

    def lines(self, groups: Tensor) -> Tensor:
        """Rows or columns of these ``groups`` (n,), in the order they have in the matrix."""
        return self.index[groups].flatten().sort().values


@dataclass(frozen=True)
class Coupling:
    """A kind of group and where its weights lie.

    Attributes:
        kind: name, numbers, sizes.
        parts: matrices it runs through, the one it is read by last.
        units: (key of the configuration, its value per group).
        fixed: keys that must be said explicitly once the width is not what they are derived from.
    """

    kind: GroupKind
    parts: tuple[Part, ...]
    units: tuple[tuple[str, int], ...]
    fixed: tuple[tuple[str, int], ...] = ()

    def changes(self, kept: int) -> dict[str, int]:
        """Of the configuration, for ``kept`` groups in each block."""
        return {key: unit * kept for key, unit in self.units} | dict(self.fixed)

    def reduced(self, name: str, value: Tensor, groups: Tensor, transposed: bool) -> Tensor:
        """A parameter of the block (``mlp.up_proj.weight``) without the groups that go; most stay as they are."""
        matrix, _, attribute = name.rpartition(".")
        for part in self.parts:
            if part.matrix == matrix and (attribute == "weight" or part.axis == 0):
                axis = part.axis if attribute == "bias" or not transposed else 1 - part.axis
                value = value.index_select(axis, part.lines(groups).to(value.device))
        return value


def changed_network(model: BlockwiseModel, changes: dict[str, int]) -> PreTrainedModel | None:
    """An empty network of the model's kind with other widths; None if its configuration or code refuses them."""
    config = model.model.config
    tree = config.to_dict() | changes
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            return AutoModelForCausalLM.from_config(
                type(config).from_dict(tree), dtype=model.dtype, trust_remote_code=model.trust_remote_code
            )
    except Exception:  # every architecture refuses in its own way, and any refusal is an answer
        return None


def find_couplings(model: BlockwiseModel, block: Block, call: Call) -> list[Coupling]:
    """Kinds of groups that can be removed: KV groups first, then MLP channels, as far as there are such.

    Args:
        model: its first block loaded.
        block: that one.
        call: arguments with which the model calls it, for a few tokens.

    Raises:
        UserError: there is none.
    """
    if model.model.config.get_text_config() is not model.model.config:
        raise UserError(
            "its configuration is nested", type(model.model).__name__, "structured removal needs a flat one"
        )
    if model.expert_layers:
        raise UserError("it has experts", type(model.model).__name__, "structured removal needs a model without")
    found = [c for c in (_heads(model, block, call), _channels(model, block, call)) if c is not None]
    if not found:
        raise UserError(
            "neither heads nor channels of its blocks can be removed: no width of the configuration changes them, "
            "or removing is not the same as zeroing", type(model.model).__name__, "use another pruning method",
        )  # fmt: skip
    return found


@torch.no_grad()
def removal_error(
    model: BlockwiseModel, network: nn.Module, block: Block, call: Call, removals: Sequence[tuple[Coupling, Tensor]]
) -> float:
    """How far the output of the smaller block is from that of the block with the groups zeroed, relative.

    Args:
        model: the dense model.
        network: empty, with the smaller widths; its block of the same name is filled and emptied again.
        block: of the dense model, loaded.
        call: its arguments for a few tokens.
        removals: couplings and the groups (kept,) that stay of each.
    """
    small = network.get_submodule(block.name)
    for name, parameter in block.module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        value: Tensor = parameter
        for coupling, groups in removals:
            value = coupling.reduced(name, value, groups, _transposed(block, owner))
        setattr(small.get_submodule(owner), attribute, nn.Parameter(value.detach(), requires_grad=False))
    small.eval()
    for name, buffer in block.module.named_buffers():
        owner, _, attribute = name.rpartition(".")
        small.get_submodule(owner)._buffers[attribute] = buffer
    output = run_block(small, call)
    release(small)
    with _zeroed(block, removals):
        reference = run_block(block.module, call)
    return float((output.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """Of `removal_error`: sums of other lengths round differently; a wrong coupling is off by 1e-2 and more."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


@contextmanager
def _zeroed(block: Block, removals: Sequence[tuple[Coupling, Tensor]]) -> Iterator[None]:
    """While open, nothing reads the groups that go."""
    before = []
    for coupling, groups in removals:
        gone = torch.ones(coupling.kind.count, dtype=torch.bool)
        gone[groups] = False
        part = coupling.parts[-1]
        weight = block.module.get_submodule(part.matrix).get_parameter("weight")
        before.append((weight, weight.detach().clone()))
        axis = 0 if _transposed(block, part.matrix) else 1
        weight.data.index_fill_(axis, part.lines(gone.nonzero().flatten()).to(weight.device), 0.0)
    try:
        yield
    finally:
        for weight, value in before:
            weight.data.copy_(value)


def _transposed(block: Block, name: str) -> bool:
    module = block.module.get_submodule(name)
    return is_matrix(module) and MatrixView(name, module).transposed


def _heads(model: BlockwiseModel, block: Block, call: Call) -> Coupling | None:
    """KV groups: the configuration's standard names of them, mapped by its own table."""
    config = model.model.config
    names = config.attribute_map
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(groups, int) or groups <= 1 or heads % groups:
        return None
    if isinstance(getattr(type(config), "head_dim", None), property):
        return None  # the width of a head follows from their number and cannot be said
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    units = [(names.get("num_attention_heads", "num_attention_heads"), heads // groups)]
    if getattr(config, "num_key_value_heads", None) is not None:
        units.append((names.get("num_key_value_heads", "num_key_value_heads"), 1))
    sections = {(heads + 2 * groups) * width: [heads * width, groups * width, groups * width]}
    fixed = (("head_dim", width),)
    counts = [k for k in range(1, groups) if _accepted(model, {n: u * k for n, u in units} | dict(fixed))]
    kind = GroupKind("KV groups", groups, 0, [*counts, groups], fine=False)
    return _measured(model, block, call, kind, tuple(units), fixed, sections) if counts else None


def _channels(model: BlockwiseModel, block: Block, call: Call) -> Coupling | None:
    """MLP channels: the key of the configuration that one matrix's columns and other matrices' rows follow."""
    views = [MatrixView(name, m) for name, m in block.module.named_modules() if is_matrix(m)]
    widths = {view.shape[1] for view in views}
    tree = model.model.config.to_dict()
    stated = [(key, value) for key, value in tree.items() if type(value) is int and value in widths and value > 1]
    derived = [(key, width) for key, value in tree.items() if value is None for width in sorted(widths)]
    for key, width in [*stated, *derived]:
        kind = GroupKind("MLP channels", width, 0, range(1, width + 1), fine=True)
        found = _measured(model, block, call, kind, ((key, 1),), (), {2 * width: [width, width]})
        if found is not None:
            return found
    return None


def _accepted(model: BlockwiseModel, changes: dict[str, int]) -> bool:
    """Whether the configuration allows these values: some want the hidden size to be a multiple of the heads."""
    config = model.model.config
    try:
        type(config).from_dict(config.to_dict() | changes)
    except Exception:  # see changed_network
        return False
    return True


def _measured(
    model: BlockwiseModel, block: Block, call: Call, kind: GroupKind, units: tuple[tuple[str, int], ...],
    fixed: tuple[tuple[str, int], ...], sections: dict[int, list[int]],
) -> Coupling | None:  # fmt: skip
    """The coupling, if the shapes follow the keys and removing is zeroing for one way of laying out the groups."""
    kept = kind.kept_counts[max(0, len(kind.kept_counts) // 2 - 1)]
    network = changed_network(model, {key: unit * kept for key, unit in units} | dict(fixed))
    sides = _sides(model, network, kind.count, kept) if network is not None else None
    if network is None or sides is None:
        return None
    layouts = [_layouts(kind.count, lines, sections if axis == 0 else {}) for _, axis, lines in sides]
    groups = torch.randperm(kind.count, generator=torch.Generator().manual_seed(0))[:kept].sort().values
    shapes = {name: MatrixView(name, block.module.get_submodule(name)).shape for name, *_ in sides}
    for indices in product(*layouts):
        parts = tuple(Part(name, axis, index) for (name, axis, _), index in zip(sides, indices, strict=True))
        weights = sum(part.index.shape[1] * shapes[part.matrix][1 - part.axis] for part in parts)
        sized = GroupKind(kind.name, kind.count, weights, kind.kept_counts, kind.fine)
        found = Coupling(sized, parts, units, fixed)
        if removal_error(model, network, block, call, [(found, groups)]) <= tolerance(model.dtype):
            return found
    return None


def _layouts(count: int, lines: int, sections: dict[int, list[int]]) -> list[Tensor]:
    """Ways in which ``lines`` rows can belong to ``count`` groups: in turn, or in turn within sections laid in a row.

    Returns:
        (count, lines / count) each.
    """
    found = [torch.arange(lines).view(count, -1)]
    if lines in sections:
        pieces = torch.arange(lines).split(sections[lines])
        found.append(torch.cat([piece.view(count, -1) for piece in pieces], dim=1))
    return found


def _sides(model: BlockwiseModel, network: PreTrainedModel, count: int, kept: int) -> list[tuple[str, int, int]] | None:
    """(matrix, axis, rows or columns) of every matrix whose shape followed, the reading one last.

    None unless every block changed alike, by the ratio kept : count, in rows (and biases) of some matrices and the
    columns of one other, and nothing else changed.
    """
    outside, blocks = _shapes(model.model)
    outside_now, blocks_now = _shapes(network)
    if outside != outside_now or len(blocks) != len(blocks_now):
        return None
    if any(b != blocks[0] for b in blocks) or any(b != blocks_now[0] for b in blocks_now):
        return None
    before, after = blocks[0], blocks_now[0]
    if before.keys() != after.keys():
        return None
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for name in (n for n in before if before[n] != after[n]):
        (old, new), (matrix, _, attribute) = (before[name], after[name]), name.rpartition(".")
        view = model.blocks[0].module.get_submodule(matrix)
        if len(old) != len(new) or not is_matrix(view):
            return None
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if len(changed) != 1 or old[changed[0]] % count or old[changed[0]] // count * kept != new[changed[0]]:
            return None
        if attribute == "weight":
            axis = 1 - changed[0] if MatrixView(matrix, view).transposed else changed[0]
            (rows if axis == 0 else columns)[matrix] = old[changed[0]]
    if not rows or len(columns) != 1 or rows.keys() & columns.keys():
        return None
    return [*((m, 0, n) for m, n in rows.items()), *((m, 1, n) for m, n in columns.items())]


def _shapes(network: nn.Module) -> tuple[Shapes, list[Shapes]]:
    """Of the parameters outside the blocks, and of each block's by their name in it."""
    blocks = find_blocks(network)
    every = network.named_parameters(remove_duplicate=False)  # tied ones count whether or not they are tied by now
    outside = {n: tuple(p.shape) for n, p in every if not _inside(n, blocks)}
    return outside, [{n: tuple(p.shape) for n, p in block.named_parameters()} for _, block in blocks]


def _inside(name: str, blocks: list[tuple[str, nn.Module]]) -> bool:
    return any(name.startswith(block + ".") for block, _ in blocks)
