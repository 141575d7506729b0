"""From a method's decisions to the network and to disk: values into modules, scales into norms, codes into tensors.

Everything is rounded to what will be stored before it is used, so that the tokens that go on, and whatever is measured
later, see the model that others will load. Where a recipe propagates what is not rounded yet, modules hold that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.grid import Levels, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup
from llmcompress.core.kernels import distance_cpu
from llmcompress.core.sparsity import count_nonzero
from llmcompress.distributed import ALONE, Team
from llmcompress.export.quantized import Scheme, experts_note, loadable, pack, stored_bits_per_weight, unsupported
from llmcompress.model.checkpoint import require_no_overflow
from llmcompress.model.fold import NormFold
from llmcompress.model.groups import InputGroup
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.matrix import MatrixView
from llmcompress.report import MatrixReport
from llmcompress.suspend import AtMatrix

#: entries of a matrix whose error is measured at once
ERROR_ENTRIES = 1 << 20


@dataclass(frozen=True)
class StoredCodes:
    """Codes of one matrix, how they are stored, and the levels of a static input grid."""

    weight: QuantizedWeight
    scheme: Scheme
    input_levels: Levels | None


class Outcome:
    """What has been decided about one block.

    Args:
        model: whose modules are written.
        in_place: False leaves the modules as they are, for tokens that go on through the dense block, until `settle` or
            `apply`.

    Attributes:
        dense: new values of parameters that stay in floating point, by parameter name, in the stored dtype.
        codes: of quantized matrices, by module name.
        warnings: what could not be stored as decided.
    """

    def __init__(self, model: BlockwiseModel, in_place: bool = True) -> None:
        self.model, self.in_place, self.dtype = model, in_place, model.checkpoint.dtype
        self.dense: dict[str, Tensor] = {}
        self.codes: dict[str, StoredCodes] = {}
        self.warnings: list[str] = []
        self._unsettled: list[tuple[MatrixView, Tensor]] = []

    def working_copies(self, group: InputGroup, targeted: list[str]) -> MatrixGroup:
        """Float32 copies of a group's matrices for the methods; those not ``targeted`` are bystanders."""
        copies = {m.name: Matrix(m.label, m.read(), self.dtype) for m in group.matrices}
        work = MatrixGroup(
            [copies[name] for name in targeted],
            [copy for name, copy in copies.items() if name not in targeted],
            fold_refusal=group.fold_refusal,
            rounds_inputs=not any(unsupported(type(m.module)) for m in group.matrices),
        )
        fold = group.fold
        if fold is not None:
            work.snap = lambda s: fold.snap(s, self.dtype)
        return work

    def commit(self, group: InputGroup, work: MatrixGroup, places: list[AtMatrix]) -> None:
        """Takes over what was decided, and renews the rows that wait at the group after a fold."""
        views = {m.label: m for m in group.matrices}
        for matrix in work.matrices:
            self._commit_matrix(views[matrix.name], matrix, work)
        if work.smoothing is None or group.fold is None:
            return
        for matrix in work.bystanders:
            self._commit_matrix(views[matrix.name], matrix, work)
        self._commit_fold(group.fold_name, group.fold, work.smoothing)
        for place in places if self.in_place else ():
            if place.norm_input is None:
                raise RuntimeError(f"{group.name}: the norm that writes its input did not run before it")
            place.x.copy_(group.fold.norm(place.norm_input).view_as(place.x))

    def settle(self) -> None:
        """The tokens are past what was committed: frees the dense values of matrices that stay in floating point."""
        for view, stored in self._unsettled:
            self._put(view, stored)
        self._unsettled.clear()

    def apply(self) -> None:
        """Writes everything that was decided into the modules."""
        for name, value in self.dense.items():
            self.model.model.get_parameter(name).data.copy_(value)
        for name, stored in self.codes.items():
            self.model.model.get_parameter(f"{name}.weight").data.copy_(stored.weight.dequantize())

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The block's tensors by name on disk: changed ones as decided, the others as they were."""
        model = self.model
        found: dict[str, Tensor] = {}
        apart = self._experts_apart(index)
        for parameter, value in self.dense.items():
            name, cut = model.disk_name(parameter), model.cuts.get(parameter)
            if cut is None or parameter in apart:
                found[parameter if cut else name] = value
                continue
            if name not in found:  # one tensor for all experts
                found |= model.checkpoint.read([name])
            cut.view(found[name]).copy_(value)
        renewed = set(found) | {model.disk_name(parameter) for parameter in apart}
        for name, stored in self.codes.items():
            parameter = f"{name}.weight"
            disk_name = parameter if parameter in apart else model.disk_name(parameter)
            renewed.add(disk_name)
            for suffix, value in pack(stored.weight, stored.scheme, self.dtype, stored.input_levels).items():
                found[disk_name.removesuffix("weight") + suffix] = value
        for parameter in apart - {f"{name}.weight" for name in self.codes} - self.dense.keys():
            found[parameter] = model.model.get_parameter(parameter).detach().to(self.dtype, copy=True)
        untouched = [name for name in model.block_sources(index) if name not in renewed]
        return found | model.checkpoint.read(untouched)

    def _experts_apart(self, index: int) -> set[str]:
        """Parameters of experts that are stacked on disk and get tensors of their own, since the block is quantized and
        its readers want it so."""
        block = self.model.blocks[index]
        if not self.codes:
            return set()
        return {
            parameter
            for name, _ in block.module.named_parameters()
            if (parameter := f"{block.name}.{name}") in self.model.cuts
            and not unsupported(type(self.model.model.get_submodule(parameter.rpartition(".")[0])))
        }

    @property
    def notes(self) -> set[str]:
        """Who cannot load what was decided."""
        found = {experts_note(scheme) for name, scheme in self.schemes.items() if self.model.merges_expert(name)}
        if self.codes and self.model.joins:
            found.add("transformers cannot load quantized weights of this architecture; vLLM and llmcompress.load can")
        return found - {""}

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of the quantized matrices, by module name."""
        return {name: stored.scheme for name, stored in self.codes.items()}

    def report(self, matrix: Matrix, error: float) -> MatrixReport:
        """The figures of one committed matrix."""
        stored = self.codes.get(matrix.name)
        bits: float = 8 * self.dtype.itemsize
        if stored is not None:
            bits = stored_bits_per_weight(stored.scheme, matrix.columns, self.dtype)
        zeros = 1 - count_nonzero(matrix.weight) / matrix.weight.numel()
        return MatrixReport(matrix.name, (matrix.weight.shape[0], matrix.columns), zeros, bits, error)

    def _commit_matrix(self, view: MatrixView, matrix: Matrix, work: MatrixGroup) -> None:
        why = "" if matrix.quantized is None else unsupported(type(view.module), matrix.quantized.grid)
        if matrix.quantized is not None and not why:
            scheme = loadable(Scheme(matrix.quantized.grid, work.activations, matrix.outputs), self.model.unpacks)
            self.codes[view.name] = StoredCodes(matrix.quantized, scheme, work.activation_levels)
            stored = matrix.weight
        else:
            if matrix.quantized is not None:
                work.activations = None
                subject = self.model.expert_layer(view.name) or view.name  # once for all of a layer's experts
                self._warn(f"{subject}: rounded weights are stored dense and inputs are not rounded, {why}")
            matrix.weight = stored = matrix.weight.to(self.dtype)  # of what follows nothing needs more
            require_no_overflow({f"{view.name}.weight": stored})  # or the tokens that go on would be blamed
            self._keep_dense(view, stored)
            if not self.in_place and view.part is None:  # parts share a tensor, and may be reached one after another
                self._unsettled.append((view, stored))
        if self.in_place:
            if matrix.unrounded is not None:
                view.write(matrix.unrounded)
            else:
                self._put(view, stored)

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:  # once for all parts of a module
            self.warnings.append(warning)

    def _keep_dense(self, view: MatrixView, stored: Tensor) -> None:
        name = f"{view.name}.weight"
        if view.part is None:
            self.dense[name] = view.as_stored(stored)
            return
        if name not in self.dense:  # parts that are not decided yet stay as they are
            self.dense[name] = view.module.get_parameter("weight").detach().to(self.dtype, copy=True)
        view.store(stored, self.dense[name])

    def _put(self, view: MatrixView, stored: Tensor) -> None:
        """Gives the module its new values: the very tensor that is kept, where it has the module's dtype."""
        parameter, kept = view.module.get_parameter("weight"), self.dense.get(f"{view.name}.weight")
        if kept is not None and (kept.dtype, kept.device) == (parameter.dtype, parameter.device):
            parameter.data = kept
        else:
            view.write(stored)

    def _commit_fold(self, name: str, fold: NormFold, s: Tensor) -> None:
        before = {name: value.detach().clone() for name, value in fold.norm.named_parameters()}
        fold.divide(s, self.dtype)
        for attribute, value in fold.norm.named_parameters():
            self.dense[f"{name}.{attribute}"] = value.detach().to(self.dtype, copy=True)
            if not self.in_place:
                value.data.copy_(before[attribute])


@torch.no_grad()
def relative_errors(
    work: MatrixGroup, views: list[MatrixView], rows: Tensor | None, dense_rows: Tensor | None, team: Team = ALONE
) -> list[float]:
    """‖W X − Q X̂‖² / ‖W X‖² per matrix.

    Args:
        work: the decided group; its Q is taken back to unsmoothed inputs.
        views: of its matrices, whose modules still hold the dense W (out, in).
        rows: X̂ (tokens, in) that reach the compressed matrices; their dtype is that of the arithmetic. None if none
            do: then the errors are those of the weights.
        dense_rows: X; the same as ``rows`` unless the dense model's outputs are aimed at.
        team: each process takes its share of the outputs.
    """
    sums = [
        _squares(team.share(matrix.weight), work.smoothing, team.share(view.weight), rows, dense_rows)
        for matrix, view in zip(work.matrices, views, strict=True)
    ]
    return [lost / max(meant, 1e-30) for lost, meant in team.added(torch.tensor(sums, dtype=torch.float64)).tolist()]


def _squares(
    weight: Tensor, smoothing: Tensor | None, dense: Tensor, rows: Tensor | None, dense_rows: Tensor | None
) -> tuple[float, float]:
    """‖W X − Q X̂‖² and ‖W X‖² of one matrix, some outputs at a time, so that what lies between stays small."""
    if rows is None or dense_rows is None:
        return _distance(dense, weight if smoothing is None else weight / smoothing)
    lost = meant = 0.0
    step = max(ERROR_ENTRIES // weight.shape[1], 1)
    for stored, W in zip(weight.split(step), dense.split(step), strict=True):
        stored = stored if smoothing is None else stored / smoothing
        if rows is dense_rows:
            expected = rows @ W.to(rows.dtype).T
            wrong = rows @ (W - stored).to(rows.dtype).T
        else:
            expected = dense_rows @ W.to(rows.dtype).T
            wrong = expected - rows @ stored.to(rows.dtype).T
        lost += float(wrong.float().square().sum())
        meant += float(expected.float().square().sum())
    return lost, meant


def _distance(dense: Tensor, stored: Tensor) -> tuple[float, float]:
    """‖W − Q‖² and ‖W‖² of ``dense`` W and float32 ``stored`` Q."""
    if dense.device.type == "cpu" and dense.dtype in (torch.float32, torch.bfloat16):
        return distance_cpu.squares(dense, stored)
    dense = dense.float()
    return float((dense - stored).square().sum()), float(dense.square().sum())
