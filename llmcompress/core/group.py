"""What a method works on: the matrices that read one tensor, and what has been decided for them.

Nothing here touches the network. A method changes float32 working copies and notes its decisions; the walk
commits them to the modules, folds the smoothing into the norm and writes the codes to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmcompress.core.block import BlockView
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.core.sparsity import zero_dropped
from llmcompress.core.stats import InputStats

#: entries of a matrix that are scored at once
PART_ENTRIES = 1 << 20


@dataclass
class Matrix:
    """One matrix under compression.

    Attributes:
        name: dotted module name in the model.
        weight: (out, in) float32 working copy; zeros and rounding are applied to it.
        scale_dtype: dtype in which quantization scales will be stored.
        keep: (out, in) bool, False where a stage decided on a zero; None while dense.
        quantized: codes and scales once a quantize stage has run.
        aim: (out, in) what error compensation aims at, in the present smoothing: the weights before the first prune
            stage, or what a stage found to be better; None for the weight itself.
        aims_at_dense: ``aim`` already allows for inputs that differ from the dense model's.
        outputs: grid to which its outputs are rounded at run time; None if they stay in floating point.
        unrounded: (out, in) values before the first rounding, in the present smoothing, where somebody asked for them.
    """

    name: str
    weight: Tensor
    scale_dtype: torch.dtype = torch.float32
    keep: Tensor | None = None
    quantized: QuantizedWeight | None = None
    aim: Tensor | None = None
    aims_at_dense: bool = False
    outputs: QuantGrid | None = None
    unrounded: Tensor | None = None

    @property
    def columns(self) -> int:
        """Input width."""
        return self.weight.shape[1]

    def trial(self, some: Callable[[Tensor], Tensor]) -> Matrix:
        """A copy of ``some`` output rows, in memory of its own."""
        keep, aim = (None if part is None else some(part).clone() for part in (self.keep, self.aim))
        return replace(self, weight=some(self.weight).clone(), keep=keep, aim=aim)

    def row_parts(self) -> Iterator[Tensor]:
        """The weights some output rows at a time, (≤ rows, in), few enough for temporaries to stay in the cache."""
        yield from self.weight.split(max(PART_ENTRIES // self.columns, 1))

    def prune(self, keep: Tensor, values: Tensor | None = None, last: bool = False) -> None:
        """Zeroes where ``keep`` (out, in) is False. What an earlier stage dropped stays dropped.

        Args:
            values: (out, in) new values of what is kept, zero elsewhere; None leaves the weights that stay as they are.
            last: no later step reads the weights before: they are overwritten.
        """
        self._require_unrounded()
        if last and values is None and self.keep is None:
            self.keep = keep
            zero_dropped(self.weight, keep)
            return
        self.aim = self.weight if self.aim is None else self.aim
        earlier, self.keep = self.keep, keep if self.keep is None else self.keep & keep
        if values is None:
            self.weight = torch.where(self.keep, self.weight, 0.0)
        else:
            self.weight = values if earlier is None else values.masked_fill(~self.keep, 0.0)

    def _require_unrounded(self) -> None:
        if self.quantized is not None:
            raise RuntimeError(f"{self.name}: its codes are fixed, and it is to change")

    def quantize(self, quantized: QuantizedWeight, out: Tensor | None = None) -> None:
        """Takes the rounded values, in the memory of ``out`` (out, in) if that is given. Zero is a level of every grid,
        so pruned weights stay exactly zero."""
        self.quantized = quantized
        self.weight = quantized.dequantize(out)


@dataclass
class MatrixGroup:
    """The matrices that read one tensor: the unit of statistics, smoothing and activation quantization.

    Attributes:
        matrices: those to be compressed.
        bystanders: other readers of the tensor: never pruned or quantized, but smoothing scales them too.
        fold_refusal: why smoothing is impossible here; empty if the producing norm's fold was verified.
        snap: rounds a scale (in,) to one the producing norm can store exactly.
        smoothing: (in,) total scale s divided out of the inputs so far; None if none.
        rounds_inputs: False where nothing rounds the inputs at run time, whatever a recipe asks for.
        activations: grid of the inputs at run time; None if they stay in floating point.
        activation_levels: of a static activation grid.
        figures: numbers a method wants in the report, e.g. the clip ratio or the damping used.
        warnings: what was skipped or degraded, in plain words.
    """

    matrices: list[Matrix]
    bystanders: list[Matrix] = field(default_factory=list)
    fold_refusal: str = ""
    snap: Callable[[Tensor], Tensor] = field(default=lambda s: s)
    smoothing: Tensor | None = None
    rounds_inputs: bool = True
    activations: QuantGrid | None = None
    activation_levels: Levels | None = None
    figures: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Matrix]:
        return iter(self.matrices)

    @property
    def name(self) -> str:
        """The first matrix's name."""
        return self.matrices[0].name

    def trial(self, some: Callable[[Tensor], Tensor] = lambda outputs: outputs) -> MatrixGroup:
        """A copy to try decisions on; steps may overwrite its matrices.

        Args:
            some: takes the output rows (≤ out, in) that take part from a tensor (out, in).
        """
        twin = copy.copy(self)
        twin.matrices = [m.trial(some) for m in self.matrices]
        twin.bystanders = [copy.copy(m) for m in self.bystanders]
        twin.figures, twin.warnings = dict(self.figures), list(self.warnings)
        return twin

    def smooth(self, s: Tensor, stats: InputStats) -> None:
        """Divides the inputs by ``s`` (in,), snapped, and multiplies the matrices' columns; statistics follow.

        Raises:
            RuntimeError: nothing takes the division up.
        """
        if self.fold_refusal:
            raise RuntimeError(f"{self.name}: its inputs cannot be divided, {self.fold_refusal}")
        before = 1.0 if self.smoothing is None else self.smoothing
        s = self.snap(before * s) / before
        for matrix in (*self.matrices, *self.bystanders):
            matrix._require_unrounded()
            matrix.weight = matrix.weight * s
            matrix.aim = None if matrix.aim is None else matrix.aim * s
            matrix.unrounded = None if matrix.unrounded is None else matrix.unrounded * s
        stats.rescale(s)
        self.smoothing = before * s

    def inputs_at_run_time(self, x: Tensor) -> Tensor:
        """Raw rows ``x`` (tokens, in) as the compressed matrices will see them: smoothed, then rounded."""
        if self.smoothing is not None:
            x = x / self.smoothing
        return x if self.activations is None else self.activations.round_activations(x, self.activation_levels)

    def output_error(self, x: Tensor, originals: list[Tensor]) -> float:
        """Σ over matrices of ‖X Wᵀ − X̂ Qᵀ‖² for raw rows ``x`` (tokens, in) and dense weights (out, in) each."""
        return float(self.output_errors(x, originals).sum())

    def output_errors(self, x: Tensor, originals: list[Tensor]) -> Tensor:
        """`output_error` by token, (tokens,) float32."""
        seen, errors = self.inputs_at_run_time(x), x.new_zeros(len(x))
        for matrix, dense in zip(self.matrices, originals, strict=True):
            errors += (x @ dense.T - seen @ matrix.weight.T).square().sum(1)
        return errors


class Method:
    """One compression step for a group. Subclasses are frozen dataclasses whose fields are the recipe's keys.

    Attributes:
        stage: where it stands in a recipe: ``clip``, ``prune``, ``smooth`` or ``quantize``.
        needs: the statistics it reads (see `llmcompress.core.stats.KINDS`).
        batch: calibration rows per micro-batch, where it matters to the step; None if it does not.
        by_rows: every output row of a matrix is decided for itself, whatever the others hold.
        learns: it learns on the whole block, not only from statistics.
    """

    stage: str
    needs: frozenset[str] = frozenset()
    batch: int | None = None
    by_rows: bool = False
    learns: bool = False

    @property
    def smooths(self) -> bool:
        """Whether it divides inputs by scales, which the norms before them have to take up."""
        return self.stage == "smooth"

    def misfit(self, columns: int) -> str:
        """Why a matrix with ``columns`` inputs cannot take this step; empty if it can."""
        return ""

    def misnamed(self, names: Sequence[str]) -> str:
        """Why the step cannot be taken with matrices of these ``names``; empty if it can."""
        return ""

    def misfit_blocks(self, shares: Sequence[float]) -> str:
        """Why the step cannot be taken on blocks with these shares of all weights; empty if it can."""
        return ""

    def misplaced(self, before: Sequence[Method]) -> str:
        """Why the step cannot be taken after those ``before`` it; empty if it can."""
        return "nothing follows a quantize stage" if any(m.stage == "quantize" for m in before) else ""

    def join(self, following: Method) -> Method | None:
        """One step that does this and the ``following`` one together, better than in turn; None if there is none."""
        return None

    def for_block(self, view: BlockView) -> Method:
        """The step as it is applied to the groups of one block; a step that learns on the block does it here."""
        return self

    def draft(self) -> Method:
        """What stands for this step in the trials of an earlier one: itself, unless it would make trials of its own."""
        return self

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        """Changes the group; returns the statistics the next step reads (usually the same).

        Args:
            group: working copies and decisions so far.
            stats: of the rows that reach the group.
            rest: the steps that follow, for those that try them out.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply")


def run_methods(methods: tuple[Method, ...], group: MatrixGroup, stats: InputStats) -> InputStats:
    """Applies the methods in order, joined where they can be; returns the statistics as the last of them left them."""
    methods = _joined(methods)
    for i, method in enumerate(methods):
        stats = method.apply(group, stats, methods[i + 1 :])
    return stats


def _joined(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    joined: list[Method] = []
    for method in methods:
        both = joined[-1].join(method) if joined else None
        if both is None:
            joined.append(method)
        else:
            joined[-1] = both
    return tuple(joined)
