"""Whether the tensors of a matrix are what quantization_config and the record say: shapes, levels, codes, zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, QuantizationType
from torch import Tensor

from llmcompress.core.sparsity import Sparsity
from llmcompress.inspection.figures import MatrixFigures, outlier_ratio
from llmcompress.inspection.stored import StoredMatrix, is_own, library_values, row_slices
from llmcompress.inspection.verdict import Verdict
from llmcompress.model.checkpoint import Checkpoint

#: rows that compressed-tensors decodes too, as a second opinion
SECOND_OPINION_ROWS = 64
#: parts that hold no share of the weights
_NOT_WEIGHTS = ("weight_shape", "input_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True)
class Claim:
    """What the record says of one matrix.

    Attributes:
        shape: (out, in).
        zeros: number of weights that are exactly zero.
        bits: stored bits per weight.
        sparsity: pattern or ratio; None if it was not pruned, or its ratio is not said per matrix.
    """

    shape: tuple[int, ...]
    zeros: int
    bits: float
    sparsity: Sparsity | None


def inspect_matrix(
    matrix: StoredMatrix, checkpoint: Checkpoint, claim: Claim | None, verdict: Verdict
) -> MatrixFigures | None:
    """The figures of one matrix, every law it must keep checked on the way; None if it does not decode."""
    tensors = matrix.read(checkpoint)
    scheme = matrix.scheme
    if scheme is None:
        strange = sorted(tensors.keys() - {"weight"})
        for part in strange:
            verdict.fail("config", matrix.parts[part], "is stored, but quantization_config leaves the matrix dense")
        if strange:
            return None
    elif not _parts_fit(matrix.name, tensors, scheme, verdict) or not _levels_fit(matrix, tensors, verdict):
        return None
    try:
        values = matrix.values(tensors)
    except (KeyError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        verdict.fail(
            "grid", matrix.name, f"does not decode: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        )
        return None
    if not verdict.require(_finite(values), "finite", matrix.name, "holds NaN or infinite weights"):
        return None
    if scheme is not None and is_own(scheme):
        _second_opinion(matrix.name, scheme, tensors, values, verdict)
    figures = measure(matrix, tensors, values, checkpoint)
    if claim is not None:
        _check_claim(claim, figures, values, verdict)
    return figures


def measure(
    matrix: StoredMatrix, tensors: Mapping[str, Tensor], values: Tensor, checkpoint: Checkpoint
) -> MatrixFigures:
    """The figures of decoded ``values`` (out, in)."""
    stored = sum(8 * t.nbytes for part, t in tensors.items() if part not in _NOT_WEIGHTS)
    if "qweight" in matrix.parts:  # read as if there were a byte for each code
        stored = sum(8 * checkpoint.tensors[n].nbytes for part, n in matrix.parts.items() if part != "g_idx")
    zeros = values.numel() - int(values.count_nonzero())
    return MatrixFigures(
        matrix.name, matrix.block, (values.shape[0], values.shape[1]), matrix.nbytes(checkpoint),
        stored / max(values.numel(), 1), matrix.container(tensors), zeros / max(values.numel(), 1), zeros,
        outlier_ratio(values, 1), outlier_ratio(values, 0),
    )  # fmt: skip


def _finite(values: Tensor) -> bool:
    return not values.numel() or all(math.isfinite(extreme) for extreme in values.aminmax())


def _parts_fit(name: str, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, verdict: Verdict) -> bool:
    """The tensors that the container of the scheme consists of, of the types and shapes it has."""
    container = CompressionFormat(scheme.format).value
    try:
        wanted = set(BaseCompressor.get_value_from_registry(container).compression_param_names(scheme))
    except (KeyError, NotImplementedError):
        verdict.skip(f"{name}: the format {container} is not known to compressed-tensors")
        return False
    wanted -= {"input_global_scale"}
    for part in sorted(wanted - tensors.keys()):
        verdict.fail("config", f"{name}.{part}", f"is missing, though quantization_config says {container}")
    if not wanted <= tensors.keys():
        return False
    static = scheme.input_activations is not None and not scheme.input_activations.dynamic
    said = f"quantization_config says {'static' if static else 'no static'} input scales"
    has_scale = "input_scale" in tensors or "input_global_scale" in tensors
    if not verdict.require(has_scale == static or not is_own(scheme), "config", f"{name}.input_scale", said):
        return False
    return not is_own(scheme) or _shapes_fit(name, tensors, scheme, verdict)


def _shapes_fit(name: str, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, verdict: Verdict) -> bool:
    weights = scheme.weights
    if "weight_packed" in tensors:
        packed, (rows, columns) = tensors["weight_packed"], tensors["weight_shape"].tolist()
        words = math.ceil(columns * weights.num_bits / 32)
        fits = packed.dtype == torch.int32 and tuple(packed.shape) == (rows, words)
        said = f"{weights.num_bits}-bit codes of {rows} × {columns} take ({rows}, {words}) int32"
        found = f"found {tuple(packed.shape)} {_spoken(packed)}"
    else:
        codes = tensors["weight"]
        rows, columns = codes.shape
        fits, said, found = codes.dtype == torch.int8, "codes are int8", f"found {_spoken(codes)}"
    if not verdict.require(fits, "config", name, f"{said}, {found}"):
        return False
    strategy = QuantizationStrategy(weights.strategy)
    sizes: dict[QuantizationStrategy, list[tuple[int, ...]]] = {
        QuantizationStrategy.TENSOR: [(1,), (1, 1), ()],
        QuantizationStrategy.CHANNEL: [(rows, 1)],
        QuantizationStrategy.GROUP: [(rows, -(-columns // max(weights.group_size or columns, 1)))],
    }
    scale = tensors["weight_scale"]
    per = f"a scale per {strategy.value}" + (f" of {weights.group_size}" if weights.group_size else "")
    return verdict.require(
        tuple(scale.shape) in sizes[strategy], "config", f"{name}.weight_scale", f"{per} is {sizes[strategy][0]}, "
        f"found {tuple(scale.shape)}",
    )  # fmt: skip


def _levels_fit(matrix: StoredMatrix, tensors: Mapping[str, Tensor], verdict: Verdict) -> bool:
    """Scales are finite and positive, zero points and codes inside the grid."""
    sound = True
    for part, tensor in tensors.items():
        if part.endswith("scale"):
            scale = tensor.float()
            good = bool(((scale > 0) & torch.isfinite(scale)).all())
            sound &= verdict.require(good, "scales", matrix.where(part), "has scales that are not finite and positive")
    scheme = matrix.scheme
    if scheme is None or scheme.weights.type != QuantizationType.INT:
        return sound
    low, high = -(1 << scheme.weights.num_bits - 1), (1 << scheme.weights.num_bits - 1) - 1
    for part in ("weight", "weight_zero_point"):
        codes = tensors.get(part)
        if codes is not None and codes.dtype != torch.int32:  # packed ones cannot leave it
            least, most = (int(extreme) for extreme in codes.aminmax())
            inside = low <= least and most <= high
            what = f"codes from {least} to {most} leave the {scheme.weights.num_bits}-bit grid [{low}, {high}]"
            sound &= verdict.require(inside, "grid", matrix.where(part), what)
    return sound


def _second_opinion(
    name: str, scheme: QuantizationScheme, tensors: Mapping[str, Tensor], values: Tensor, verdict: Verdict
) -> None:
    """compressed-tensors' own decompression of the first rows."""
    rows = min(SECOND_OPINION_ROWS, values.shape[0])
    try:
        theirs = library_values(scheme, row_slices(tensors, rows))
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        verdict.fail("grid", name, f"compressed-tensors does not decode it: {str(error).splitlines()[0][:120]}")
        return
    ours = values[:rows]
    # theirs is rounded to the dtype of the scale
    close = theirs.shape == ours.shape and torch.allclose(ours, theirs, rtol=2**-7, atol=0.0)
    verdict.require(close, "second opinion", name, "compressed-tensors decodes it to other values")


def _check_claim(claim: Claim, figures: MatrixFigures, values: Tensor, verdict: Verdict) -> None:
    name = figures.name
    said = f"the record says {tuple(claim.shape)}, found {figures.shape}"
    if not verdict.require(tuple(claim.shape) == figures.shape, "record", name, said):
        return
    said = f"the record says {claim.zeros} zeros, found {figures.zeros}"
    verdict.require(claim.zeros == figures.zeros, "zeros", name, said)
    # a scale per tensor, and the padding of packed rows, are not in the recorded figure
    slack = 64 / figures.weights + 32 / figures.shape[1] * (figures.format == CompressionFormat.pack_quantized.value)
    agrees = claim.bits - 1e-3 <= figures.bits <= claim.bits + slack + 1e-3
    said = f"the record says {claim.bits:.3f} bits a weight, {figures.bits:.3f} are stored"
    verdict.require(agrees, "bits", name, said)
    if claim.sparsity is not None:
        _check_pattern(claim.sparsity, name, values, verdict)


def _check_pattern(sparsity: Sparsity, name: str, values: Tensor, verdict: Verdict) -> None:
    """N:M in every group, or the ratio in the whole up to the rounding of a row or a block."""
    if not sparsity.m:
        zeros = values.numel() - int(values.count_nonzero())
        least = sparsity.ratio * values.numel() - max(values.shape)
        verdict.require(zeros >= least, "masks", name, f"{zeros} zeros are fewer than the ratio {sparsity} asks for")
        return
    if values.shape[1] % sparsity.m:
        verdict.fail("masks", name, f"{sparsity} does not divide its inputs")
        return
    kept = values.view(-1, sparsity.m).count_nonzero(1)
    broken = int((kept > sparsity.n).sum())
    said = f"{broken} of {len(kept)} groups keep more than {sparsity.n} of {sparsity.m} weights"
    if broken:
        first = int((kept > sparsity.n).nonzero()[0]) * sparsity.m
        said += f", the first at row {first // values.shape[1]}, column {first % values.shape[1]}"
    verdict.require(not broken, "masks", name, said)


def _spoken(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
