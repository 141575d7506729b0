"""The optimal-brain sweep: prune, quantize or both, column by column, later columns absorbing earlier errors.

SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774) and GPTQ (Frantar et al., 2022, arXiv:2210.17323) minimise
tr(E H Eᵀ) with E = Q − W. Departure: they factor H, invert it and factor the inverse; here there is one Cholesky
factorisation and no inverse. With H = V Vᵀ and V upper triangular the loss is ‖E V‖², and while columns i < k are fixed

    target_k = W_k − (Σ_{i<k} E_i V_ik) / V_kk,   Q_k = project(target_k),   E_k = Q_k − W_k

minimises its k-th column. The papers' U = chol(H⁻¹) is V⁻¹, so their score w² / U_kk² is w² V_kk² on the adjusted
weights W_B − S V_BB⁻¹, where S is that sum over the columns before B. `sweep_reference` is this, to be read beside the
papers; `sweep` is the same in blocks of columns: one matrix product per block, then a compiled kernel."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from numba.core import config
from scipy.linalg.lapack import dpotrf, spotrf
from torch import Tensor

from llmcompress.core.kernels import sweep_cpu
from llmcompress.core.stats import mirror
from llmcompress.core.targets import ColumnTarget, Mask, Round
from llmcompress.errors import UserError

#: multiples of the median of H's diagonal that an entry counts as at most in the mean that damping is a share of
OUTLIER = 10.0
#: multiples of the mean diagonal beyond which more damping would leave nothing of H
MOST_DAMPING = 1e4
#: columns whose carried errors one matrix product gives
BLOCK = 512
#: entries of E that are kept at once where rows do not depend on each other, and rows that are worth a product
PART_ENTRIES, PART_ROWS = 6 << 20, 512


@dataclass(frozen=True)
class Factor:
    """H + λI = V Vᵀ.

    Attributes:
        V: (in, in) upper triangular.
        dead: (in,) bool: inputs that were zero in every row.
        damping: λ as a multiple of the mean of H's diagonal, outliers bounded.
        ridge: λ itself.
    """

    V: Tensor
    dead: Tensor
    damping: float
    ridge: float


def factorise(H: Tensor, damping: float = 0.01, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> Factor:
    """Factors the damped Gram matrix: the lower Cholesky factor of H with both axes reversed, reversed back.

    Departure: the papers damp by a multiple of the diagonal's mean. A few channels of large inputs, which large models
    have, raise the mean by orders of magnitude and with it the damping of all others, whose errors are then hardly
    compensated. Here no channel counts as more than ten times the median in that mean.

    Dead inputs get that mean of the diagonal. Where H is not positive definite the damping is multiplied
    by ten until it is.

    Args:
        H: (in, in) symmetric.
        damping: first λ, as a multiple of that mean, over live inputs.
        dtype: of the factorisation; V is returned in H's own.
        overwrite: H is no longer needed: V takes its memory, if ``dtype`` is H's own.

    Raises:
        UserError: H holds NaN or infinite values.
    """
    invalid = UserError("the calibration's Gram matrix holds NaN or infinite values", fix="calibrate in float32")
    diagonal = H.diagonal().to(dtype, copy=True)
    if not torch.isfinite(diagonal.sum()):
        raise invalid
    dead = diagonal == 0
    live = torch.ones(1) if bool(dead.all()) else diagonal[~dead].double()
    mean, most = float(live.clamp(max=OUTLIER * live.median()).mean()), MOST_DAMPING * float(live.mean())
    work = _reverse(H if overwrite and H.dtype == dtype and H.is_contiguous() else H.to(dtype, copy=True).contiguous())
    while damping * mean <= most:
        work.diagonal().copy_((diagonal + dead * mean + damping * mean).flip(0))
        if _cholesky(work):
            return Factor(_reverse(work).triu_().to(H.dtype), dead, damping, damping * mean)
        mirror(work)  # the upper triangle still is H's
        damping *= 10
    raise invalid


def _reverse(matrix: Tensor, chunk: int = 1 << 20) -> Tensor:
    """Reverses both axes of a contiguous matrix in place: its entries in the opposite order."""
    entries = matrix.view(-1)
    size = len(entries)
    for first in range(0, size // 2, chunk):
        last = min(first + chunk, size // 2)
        head = entries[first:last].flip(0)
        entries[first:last] = entries[size - last : size - first].flip(0)
        entries[size - last : size - first] = head
    return matrix


def _cholesky(matrix: Tensor) -> bool:
    """Puts the lower Cholesky factor into the lower triangle, in place, and leaves what is above the diagonal.

    Returns:
        False if the matrix is not positive definite; its lower triangle and diagonal are then lost.
    """
    if matrix.device.type == "cpu":  # row-major lower is column-major upper
        potrf = dpotrf if matrix.dtype == torch.float64 else spotrf
        _, failed = potrf(matrix.numpy().T, lower=0, overwrite_a=1, clean=0)
    else:
        lower, info = torch.linalg.cholesky_ex(matrix)
        failed = int(info)
        if not failed:
            matrix.copy_(lower + matrix.triu(1))
    return not failed and bool(torch.isfinite(matrix.diagonal()).all())


def sweep_reference(weight: Tensor, factor: Factor, targets: Sequence[ColumnTarget]) -> Tensor:
    """The sweep as written above, one column at a time, for any targets, dtype and device.

    Args:
        weight: (out, in) W.
        factor: of the damped Gram matrix.
        targets: hold their decisions afterwards.

    Returns:
        (out, in) Q.
    """
    V, Q, E = factor.V, weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        for target in targets:
            if target.group and j % target.group == 0:
                ahead = slice(j, j + target.group)
                carried = E[:, :j] @ V[:j, ahead]
                free = torch.linalg.solve_triangular(V[ahead, ahead], carried, upper=True, left=False)
                target.begin(weight[:, ahead] - free, j)
        column = weight[:, j] - E[:, :j] @ V[:j, j] / V[j, j]
        for target in targets:
            column = target.project(column, j)
        Q[:, j], E[:, j] = column, column - weight[:, j]
    return Q


def sweep(
    weight: Tensor,
    factor: Factor,
    mask: Mask | None = None,
    rounding: Round | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`sweep_reference` for a mask, a grid, or a mask and then a grid, at the speed of matrix products.

    Args:
        weight: (out, in) float32 W.
        factor: of the damped Gram matrix, float32.
        mask, rounding: hold their decisions afterwards.
        out: (out, in) contiguous, where to put Q: ``weight`` itself if that is no longer needed.

    Devices for which there is no kernel, other dtypes, random rounding, and on CUDA grids that are no integers take the
    reference.

    Returns:
        (out, in) Q: exact zeros, values on the grid.

    Raises:
        UserError: a quantization group cuts through an N:M group.
    """
    targets: list[ColumnTarget] = [t for t in (mask, rounding) if t is not None]
    kernels = kernels_for(weight.device)
    if weight.dtype != torch.float32 or kernels is None or not _compiled(rounding, weight.device):
        Q = sweep_reference(weight, factor, targets)
        return Q if out is None else out.copy_(Q)
    W = weight.contiguous()
    Q = torch.empty_like(W) if out is None else out
    most = len(W) if mask is not None and mask.compares_rows else max(PART_ENTRIES // W.shape[1], PART_ROWS)
    step = -(-len(W) // -(-len(W) // most))  # parts of one size
    for first in range(0, len(W), step):
        rows = slice(first, first + step)
        kept = None if mask is None else mask.part(rows)
        rounded = None if rounding is None else rounding.part(rows, kept)
        _sweep_rows(kernels, W[rows], Q[rows], factor.V, kept, rounded)
        if mask is not None and kept is not None:
            mask.take(rows, kept)
        if rounding is not None and rounded is not None:
            rounding.take(rows, rounded)
    return Q


def _sweep_rows(
    kernels: ModuleType, W: Tensor, Q: Tensor, V: Tensor, mask: Mask | None, rounding: Round | None
) -> None:  # fmt: skip
    """The sweep of rows that are decided together, block by block of columns, into ``Q``."""
    E, sums = W.new_empty(W.shape[1], W.shape[0]), W.new_empty(BLOCK, W.shape[0])  # (in, out), (≤ block, out)
    outside: list[ColumnTarget] = [
        t for t in (mask, rounding) if t is not None and t.group and not (t is mask and mask.sparsity.m)
    ]
    for block in _blocks(len(V), mask.sparsity.m if mask else 0, [t.group for t in outside], kernels.COLUMNS):
        b = block[0].start
        carried = torch.mm(V[:b, b : block[-1].stop].T, E[:b], out=sums[: block[-1].stop - b])
        for now in block:
            S = carried[now.start - b : now.stop - b]
            if now.start > b:
                S.addmm_(V[b : now.start, now].T, E[b : now.start])
            for target in outside:
                if now.start % target.group == 0:
                    ahead = slice(now.start, min(now.start + target.group, len(V)))
                    known = S if ahead.stop <= now.stop else carried if now.start == b else carried[:0]
                    target.begin(_adjusted(kernels, W, E, V, ahead, known), now.start)
            _sweep_columns(kernels, W, Q, E[now], S, V, now, mask, rounding)


def _blocks(columns: int, m: int, groups: list[int], most: int) -> list[list[slice]]:
    """Blocks of columns, cut into what the kernel takes at once: at most ``most``, between decisions made outside."""
    if any(group % m for group in groups if m):
        raise UserError(
            f"quantization groups of {groups[0]} columns cut through {m}-column sparsity groups", "quantize"
        )
    size, step = (width // m * m or m if m else width for width in (BLOCK, most))
    blocks = []
    for b in range(0, columns, size):
        end = min(b + size, columns)
        starts = {j for group in groups for j in range(-(-b // group) * group, end, group)}
        cuts = [*sorted(starts.union(range(b, end, step))), end]
        blocks.append([slice(first, last) for first, last in pairwise(cuts)])
    return blocks


def _adjusted(kernels: ModuleType, W: Tensor, E: Tensor, V: Tensor, ahead: slice, carried: Tensor) -> Tensor:
    """(out, group) weights that a decision on the columns ``ahead`` sees.

    Args:
        carried: (≥ group, out) Σ E_i V_ik over the earlier columns; computed here if it holds too few columns.
    """
    if ahead.start == 0:
        return W[:, ahead]
    if len(carried) < ahead.stop - ahead.start:
        carried = V[: ahead.start, ahead].T @ E[: ahead.start]
    carried = carried[: ahead.stop - ahead.start]
    adjusted = torch.empty_like(carried)
    block = V[ahead, ahead].contiguous()
    kernels.adjust_columns(W, ahead.start, carried, block, adjusted)
    return adjusted.T


def _sweep_columns(
    kernels: ModuleType,
    W: Tensor,
    Q: Tensor,
    E: Tensor,
    S: Tensor,
    V: Tensor,
    now: slice,
    mask: Mask | None,
    rounding: Round | None,
) -> None:
    """Hands columns ``now`` to the compiled kernel."""
    none = torch.empty(0, 0, device=W.device)
    n, m = (mask.sparsity.n, mask.sparsity.m) if mask else (0, 0)
    keep = mask.keep.T[now] if mask else none.bool()
    scale, zero = (rounding.scale, rounding.zero) if rounding else (none, none)
    level_of = rounding.level_of[now] if rounding else none.long().view(-1)
    codes = rounding.grid.range if rounding else (0, 0)
    table = rounding.grid.table if rounding else None
    tables = () if table is None else ((table.middles, table.values),)
    block = V[now, now].contiguous()
    kernels.sweep_columns(W, Q, now.start, E, S, block, keep, n, m, scale, zero, level_of, codes, *tables)


def _compiled(rounding: Round | None, device: torch.device) -> bool:
    """Whether the kernels of a device know how to round so."""
    if rounding is None:
        return True
    return rounding.generator is None and (rounding.grid.kind == "int" or device.type == "cpu")


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module of compiled kernels for a device: numba's on a CPU, unless numba is told not to compile, Triton's on
    CUDA where it is installed."""
    if device.type == "cpu" and not config.DISABLE_JIT:
        return sweep_cpu
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("llmcompress.core.kernels.sweep_cuda")
    return None
