"""The way of the calibration images through a network of convolutions: from one matrix input to the next, in the order
of execution, which a forward shows. Every matrix is calibrated on what its compressed predecessors produce, in one
forward in all (see `llmcompress.block_pass`); statistics, steps and grids are those of every other matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.block_pass import BlockPass, Stop
from llmcompress.commit import relative_errors
from llmcompress.core.grid import QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError
from llmcompress.lane import require_finite, sample
from llmcompress.model.groups import InputGroup
from llmcompress.model.matrix import MatrixView, is_matrix
from llmcompress.report import MatrixReport
from llmcompress.suspend import AtMatrix, SuspendedForward
from llmcompress.vision.fold import replace_module
from llmcompress.vision.layers import Rounding, joined, round_inputs, round_layer
from llmcompress.vision.network import logits
from llmcompress.vision.recipe import VisionRecipe

#: rows that statistics of a layer are taken on; windows of one image overlap, so that more tell little
MOST_ROWS = 1 << 16


@torch.no_grad()
def input_groups(module: nn.Module, x: Tensor) -> list[InputGroup]:
    """The matrices of a network, those that read one tensor the same way together, in the order of execution.

    Args:
        module: in evaluation mode.
        x: (N, C, H, W), one image will do.
    """
    names = {layer: name for name, layer in module.named_modules()}
    groups: dict[tuple[object, ...], InputGroup] = {}
    seen: set[nn.Module] = set()
    alive: list[Tensor] = []

    def reads(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in seen:
            return
        seen.add(layer)
        tensor: Tensor = args[0]
        alive.append(tensor)
        view = MatrixView(names[layer], layer)
        key = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), view.geometry)
        groups.setdefault(key, InputGroup([], view.shape[1])).matrices.append(view)

    hooks = [layer.register_forward_pre_hook(reads) for layer in module.modules() if is_matrix(layer)]
    try:
        logits(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return list(groups.values())


@dataclass
class Walked:
    """What the walk made.

    Attributes:
        matrices: reports in order; of a convolution with groups one for each.
        rounding: of the layers that were rounded, by name.
        masks: (the weight's shape) bool by layer name, False where a weight was dropped.
        warnings: what was skipped or degraded.
    """

    matrices: list[MatrixReport] = field(default_factory=list)
    rounding: dict[str, Rounding] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class LayerWalk:
    """Compresses the matrices of a network one after the other.

    Args:
        module: in evaluation mode; its weights, biases and layers are changed in place.
        batches: (n, C, H, W) each, calibration images.
        recipe: its stages, targets, and whether biases are corrected.
        methods: instead of the recipe's, by layer name, such as with other bits.
        masks: weights decided on already, by layer name, of the weight's shape; the steps hold them.
        refuse: a pattern or group that does not divide a layer is an error; otherwise the layer stays dense.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Tensor],
        recipe: VisionRecipe,
        *,
        methods: Mapping[str, tuple[Method, ...]] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        refuse: bool = False,
    ) -> None:
        self.module, self.batches, self.recipe, self.refuse = module, batches, recipe, refuse
        self._methods, self._masks = methods or {}, masks or {}
        self._core = recipe.methods
        self._needs = frozenset[str]().union(*(m.needs for m in self._core))
        self.result = Walked()
        self._codes: dict[str, list[QuantizedWeight]] = {}
        self._shifts: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def run(self) -> Iterator[str]:
        """Yields the name of each input group once it is done; `result` is complete at the end.

        Raises:
            UserError: NaN or infinities reach a layer, or a step cannot be taken.
        """
        found = input_groups(self.module, self.batches[0][:1])
        groups = [kept for group in found if (kept := self._wanted(group)).matrices]
        self._note_uncalled({m.name for group in found for m in group.matrices})
        way = self._way(self.module, groups)
        dense = self._way(copy.deepcopy(self.module), groups).arrivals() if "cross" in self._needs else None
        for number, places in way.arrivals():
            twins = places if dense is None else next(dense)[1]
            for part in groups[number].parts():
                work = self._serve(part, places, twins)
            self._commit(groups[number], work)
            if work.activations is not None:
                grid, levels = work.activations, work.activation_levels
                way.rounding[number] = partial(round_inputs, grid=grid, levels=levels)
            yield groups[number].name
        for name, rounding in self.result.rounding.items():
            replace_module(self.module, name, round_layer(self.module.get_submodule(name), rounding))

    def _way(self, module: nn.Module, groups: Sequence[InputGroup]) -> BlockPass:
        stops = [Stop([module.get_submodule(m.name) for m in group.matrices], None) for group in groups]
        forwards = [SuspendedForward(partial(logits, module, x)) for x in self.batches]
        return BlockPass(module, stops, forwards, replay=False, last=True)

    def _wanted(self, group: InputGroup) -> InputGroup:
        """The group without what is not targeted or does not fit the steps."""
        kept = []
        for view in group.matrices:
            if not self.recipe.targets(view.name):
                continue
            misfit = next((m for step in self._steps(view.name) if (m := step.misfit(view.shape[1]))), "")
            if misfit and self.refuse:
                raise UserError(misfit, view.name, "exclude it, or use --on-misfit skip")
            if misfit:
                self.result.warnings.append(f"{view.name}: left dense, {misfit}")
            else:
                kept.append(view)
        return replace(group, matrices=kept)

    def _steps(self, name: str) -> tuple[Method, ...]:
        return self._methods.get(name, self._core)

    def _note_uncalled(self, called: set[str]) -> None:
        for name, layer in self.module.named_modules():
            if is_matrix(layer) and name not in called and self.recipe.targets(name):
                self.result.warnings.append(f"{name}: left dense, the network does not call it")

    def _serve(self, group: InputGroup, places: list[AtMatrix], twins: list[AtMatrix]) -> MatrixGroup:
        """Runs the steps on one input group (or one of the groups of its convolutions) and notes what they decided."""
        reader = group.matrices[0]
        rows, dense_rows = ([reader.rows(place.x) for place in lane] for lane in (places, twins))
        require_finite(group.name, rows)
        stride = -(-sum(map(len, rows)) // MOST_ROWS)
        rows, dense_rows = ([x[::stride] for x in lane] for lane in (rows, dense_rows))
        work = MatrixGroup(
            [Matrix(m.label, m.read()) for m in group.matrices], fold_refusal="no norm can be divided for a convolution"
        )
        self._hold_masks(group, work)
        stats = InputStats(group.width, self._needs)
        for x, dense in zip(rows, dense_rows, strict=True):
            stats.update(x, dense)
        for kind, pick in (("low", Tensor.amin), ("high", Tensor.amax)):
            if kind in stats.sums:  # rows may have been left out, but no value of the input is out of range
                extreme = pick(torch.stack([pick(place.x) for place in places]))
                stats.sums[kind] = (torch.minimum if kind == "low" else torch.maximum)(stats.sums[kind], extreme)
        run_methods(self._steps(reader.name), work, stats)
        seen = sample(rows)
        errors = relative_errors(work, group.matrices, seen, sample(dense_rows))
        meant = sum(x.sum(0) for x in dense_rows) / sum(map(len, dense_rows))
        met = sum(work.inputs_at_run_time(x).sum(0) for x in rows) / sum(map(len, rows))
        for view, matrix, error in zip(group.matrices, work, errors, strict=True):
            self._shifts.setdefault(view.name, []).append(view.read() @ meant - matrix.weight @ met)
            self._note(view, matrix, error)
            view.write(matrix.weight)
        self.result.warnings += work.warnings
        return work

    def _hold_masks(self, group: InputGroup, work: MatrixGroup) -> None:
        for view, matrix in zip(group.matrices, work, strict=True):
            mask = self._masks.get(view.name)
            if mask is not None:
                mask = mask if view.part is None else mask.chunk(view.groups)[view.part]
                matrix.prune(mask.reshape(matrix.weight.shape))

    def _note(self, view: MatrixView, matrix: Matrix, error: float) -> None:
        """The matrix's line of the report, and its codes."""
        bits = 32.0
        if matrix.quantized is not None:
            self._codes.setdefault(view.name, []).append(matrix.quantized)
            bits = matrix.quantized.grid.bits_per_weight(matrix.columns, scale_bits=32)
        zeros = float((matrix.weight == 0).float().mean())
        shape = (matrix.weight.shape[0], matrix.columns)
        self.result.matrices.append(MatrixReport(matrix.name, shape, zeros, bits, error))
        if matrix.keep is not None:
            whole = self.result.masks.setdefault(
                view.name, torch.ones_like(view.module.get_parameter("weight"), dtype=torch.bool)
            )
            part = whole if view.part is None else whole.chunk(view.groups)[view.part]
            part.copy_(matrix.keep.view_as(part))

    def _commit(self, group: InputGroup, work: MatrixGroup) -> None:
        """What concerns whole modules: corrected biases, codes of all groups, the grid of the input."""
        for view in group.matrices:
            if self.recipe.bias_correction:
                shift = torch.cat(self._shifts[view.name])
                bias = view.module.bias
                moved = shift if bias is None else bias.detach() + shift  # type: ignore[operator]
                view.module.bias = nn.Parameter(moved, requires_grad=False)
            codes = self._codes.get(view.name)
            if codes or work.activations is not None:
                weight = joined(codes) if codes else None
                self.result.rounding[view.name] = Rounding(weight, work.activations, work.activation_levels)
