"""Quantized matrices as compressed-tensors checkpoints, which transformers, vLLM and SGLang load.

The configuration is built from the library's own objects and the packing is the library's own; codes are stored as they
were chosen, never rounded again. The container of a matrix follows from its scheme (``storage_format``):

| scheme                                           | format           | a code takes     | who runs it                 |
|--------------------------------------------------|------------------|------------------|-----------------------------|
| symmetric weights only, 2–8 bits                 | `pack-quantized` | its bits         | transformers; vLLM: 4 and 8 |
| W8 with activations; W4 with 8-bit activations   | `int-quantized`  | one byte         | transformers, vLLM          |
| other symmetric weights with activations (W6A6)  | `pack-quantized` | its bits         | transformers                |
| asymmetric weights, any bits                     | `int-quantized`  | one byte         | transformers                |
| weights only, where the model cannot be unpacked | `int-quantized`  | one byte         | transformers                |
| fp8 weights, with or without fp8 activations     | `float-quantized`| one byte         | transformers, vLLM          |
| nvfp4, mxfp4 weights only                        | `nvfp4-pack-quantized`, `mxfp4-pack-quantized` | 4 bits | both |

Asymmetric codes: packed zero points of compressed-tensors 0.20 do not load in transformers 5.23, which expects them
unpacked and stops at a size mismatch; ``storage_note`` says so to the user. Where a block flattens (batch, token) into
rows before a matrix, as OPT does before its MLP, transformers takes one activation scale for all rows instead of one
per token; served models and this program's own reading do not. Only ``nn.Linear`` can be quantized in this format
(``unsupported``); other modules are to be stored with their rounded values, dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor, nn

from llmcompress.core.codebook import KINDS
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.errors import UserError
from llmcompress.export.floats import float_args, float_grid, pack_floats, unpack_floats
from llmcompress.export.levels import pack_levels, unpack_levels
from llmcompress.export.library import library_schemes
from llmcompress.export.patterns import name_patterns

INT_QUANTIZED = CompressionFormat.int_quantized.value
PACK_QUANTIZED = CompressionFormat.pack_quantized.value
FLOAT_FORMATS = {
    "fp8": CompressionFormat.float_quantized.value,
    "nvfp4": CompressionFormat.nvfp4_pack_quantized.value,
    "mxfp4": CompressionFormat.mxfp4_pack_quantized.value,
}
READABLE_FORMATS = (INT_QUANTIZED, PACK_QUANTIZED, CompressionFormat.naive_quantized.value, *FLOAT_FORMATS.values())

#: of schemes with ``output_activations``, which transformers applies
OUTPUTS_NOTE = "vLLM does not round the outputs of q, k and v as transformers and this program do"

_PACKED_ROWS = 1024  # packing widens codes to int32 several times over: a slice at a time keeps that small


@dataclass(frozen=True)
class Scheme:
    """How one Linear is quantized.

    Attributes:
        weights: grid of the weight.
        activations: grid of its input; None leaves the input alone.
        outputs: grid of its output, dynamic; None leaves the output alone.
        packs: False where transformers cannot load packed codes, whatever the grid: they then take a byte each.
    """

    weights: QuantGrid
    activations: QuantGrid | None = None
    outputs: QuantGrid | None = None
    packs: bool = True

    def stored(self) -> Scheme:
        """What of the scheme a checkpoint records: not the observer and the seed, which only chose scales and codes."""
        inputs = None if self.activations is None else replace(self.activations, observer="minmax")
        return replace(self, weights=replace(self.weights, observer="minmax", stochastic=None), activations=inputs)


def unsupported(module_type: type[nn.Module], grid: QuantGrid | None = None) -> str:
    """Why modules of this type cannot be stored quantized, or not on this grid; empty if they can."""
    if grid is not None and uncontained(grid):
        return uncontained(grid)
    if getattr(module_type, "stacked", False):
        return "compressed-tensors has no room for the stacked experts of this checkpoint"
    if issubclass(module_type, nn.Linear):
        return ""
    return f"compressed-tensors quantizes Linear modules only, not {module_type.__name__}"


def uncontained(grid: QuantGrid) -> str:
    """Why no checkpoint holds codes of this grid; empty if one does."""
    return f"compressed-tensors has no container for {grid.kind} levels" if grid.kind in KINDS else ""


def storage_format(scheme: Scheme) -> str:
    """The compressed-tensors format of a matrix (table in the module)."""
    weights, activations = scheme.weights, scheme.activations
    if weights.kind != "int":
        return FLOAT_FORMATS[weights.kind]
    if not (weights.symmetric and scheme.packs):
        return INT_QUANTIZED
    if activations is None:
        return PACK_QUANTIZED
    served = weights.bits == 8 or (weights.bits == 4 and activations.bits == 8)
    return INT_QUANTIZED if served else PACK_QUANTIZED


def loadable(scheme: Scheme, unpacks: bool) -> Scheme:
    """The scheme as it has to be stored where transformers cannot load packed codes."""
    return replace(scheme, packs=False) if not unpacks and storage_format(scheme) == PACK_QUANTIZED else scheme


def storage_bits(scheme: Scheme) -> int:
    """Bits that one code takes on disk."""
    packed = storage_format(scheme) == PACK_QUANTIZED or scheme.weights.kind != "int"
    return scheme.weights.bits if packed else 8


def stored_bits_per_weight(scheme: Scheme, columns: int, dtype: torch.dtype) -> float:
    """Bits on disk per weight of a matrix with ``columns`` inputs: its code, and its share of the scale, stored in
    ``dtype``, and of the zero point, which takes a byte."""
    grid = scheme.weights
    if grid.group == "tensor":
        return float(storage_bits(scheme))
    levels = 8 * dtype.itemsize + (0 if grid.symmetric else 8) if grid.kind in ("int", "fp8") else 8
    return storage_bits(scheme) + levels / grid.group_size(columns)


def storage_note(scheme: Scheme) -> str:
    """What the user should know about how ``scheme`` is stored; empty if nothing."""
    if scheme.outputs is not None:
        return "; ".join(filter(None, [storage_note(replace(scheme, outputs=None)), OUTPUTS_NOTE]))
    bits, stored = scheme.weights.bits, storage_bits(scheme)
    if stored == bits:
        return ""
    why = "as int8 kernels expect" if scheme.weights.symmetric else "since packed zero points cannot be reloaded"
    if not scheme.packs:
        why = "since transformers cannot load packed weights of this architecture; nor can vLLM load them so"
    return f"{bits}-bit weights of this scheme take {stored} bits each on disk, {why}"


def experts_note(scheme: Scheme) -> str:
    """What the user should know about experts stored with ``scheme``, each for itself, which transformers stacks when
    it loads them; empty if nothing."""
    if storage_format(scheme) == INT_QUANTIZED:
        return "transformers cannot load experts stored in one byte a weight; vLLM and llmcompress.load can"
    return "" if scheme.activations is None else "transformers does not round the inputs of experts; vLLM does"


def quantization_config(
    schemes: Mapping[str, Scheme], all_linears: Iterable[str], kv_cache: bool = False
) -> dict[str, Any]:
    """``config.json["quantization_config"]``.

    Args:
        schemes: the scheme of each quantized Linear by module name; not empty.
        all_linears: names of every Linear of the model, lm_head and excluded ones included.
        kv_cache: whether scales of keys and values in FP8 are stored too.

    Raises:
        ValueError: ``schemes`` is empty or names something that is not among ``all_linears``.
    """
    linears = list(all_linears)
    strangers = sorted(schemes.keys() - set(linears))
    if strangers or not schemes:
        raise ValueError(f"{strangers[0]} is not a Linear of the model" if strangers else "no matrix is quantized")
    groups: dict[Scheme, list[str]] = {}
    for name in linears:
        if name in schemes:
            groups.setdefault(schemes[name].stored(), []).append(name)
    if len(groups) == 1:
        targets = [["Linear"]]
        ignore = name_patterns([name for name in linears if name not in schemes], linears)
    else:
        targets, ignore = [name_patterns(names, linears) for names in groups.values()], []
    formats = {storage_format(scheme) for scheme in groups}
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": _library_scheme(scheme, target)
            for i, (scheme, target) in enumerate(zip(groups, targets, strict=True))
        },
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
        kv_cache_scheme=float_args(QuantGrid(8, group="tensor", kind="fp8")) if kv_cache else None,
    )
    dumped = config.model_dump(mode="json", exclude={"global_compression_ratio", "moe_sparsity_config"})
    # Sparsity has no live container in this format: zeros are stored as ordinary codes.
    return dumped | {"sparsity_config": {}, "transform_config": {}, "version": compressed_tensors.__version__}


def pack(
    quantized: QuantizedWeight, scheme: Scheme, dtype: torch.dtype, activations: Levels | None = None
) -> dict[str, Tensor]:
    """The tensors of one Linear by their name within it, e.g. ``{"weight": int8, "weight_scale": dtype}``.

    Args:
        quantized: codes (out, in) and levels.
        scheme: its grid must be that of ``quantized``.
        dtype: of the model; the scales must be exact in it.
        activations: levels (1, 1) of a static activation grid.

    Raises:
        ValueError: the parts do not agree, or a code or scale would not read back as given.
    """
    grid, levels, codes = scheme.weights, quantized.levels, quantized.codes
    if Scheme(quantized.grid).stored() != Scheme(grid).stored():
        raise ValueError(f"codes of {quantized.grid} under a scheme of {grid}")
    low, high = grid.range if grid.kind == "int" else (-128, 127)
    if codes.dtype != torch.int8 or codes.amin() < low or codes.amax() > high:
        raise ValueError(f"codes outside {grid.range}")
    static = scheme.activations is not None and not scheme.activations.dynamic
    if static != (activations is not None):
        raise ValueError("activation levels belong to static activations, and only to them")
    tensors = _pack_codes(codes, levels, scheme, dtype)
    if activations is not None and scheme.activations is not None:
        tensors |= pack_levels("input", scheme.activations, activations, dtype)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of ``pack``: codes (out, in) int8 and float32 levels, from tensors by their name in the Linear."""
    if scheme.weights.kind != "int":
        return QuantizedWeight(*unpack_floats(scheme.weights.kind, tensors), scheme.weights)
    if "weight_packed" in tensors:
        packed, shape = tensors["weight_packed"], torch.Size(tensors["weight_shape"].tolist())
        parts = [
            unpack_from_int32(part, scheme.weights.bits, torch.Size((part.shape[0], shape[1])))
            for part in packed.split(_PACKED_ROWS)
        ]
        codes = torch.cat(parts)
    else:
        codes = tensors["weight"]
    return QuantizedWeight(codes, unpack_levels("weight", tensors), scheme.weights)


def unpack_activations(tensors: Mapping[str, Tensor]) -> Levels | None:
    """The static activation levels (1, 1) stored with a Linear; None if it has none."""
    return unpack_levels("input", tensors) if "input_scale" in tensors else None


def schemes_of(config: Mapping[str, Any], linear_names: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each quantized Linear by name, read from a ``quantization_config``.

    Raises:
        UserError: not an integer compressed-tensors checkpoint.
    """
    return {name: _own_scheme(group) for name, group in library_schemes(config, linear_names).items()}


def _library_scheme(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    return QuantizationScheme(
        targets=targets,
        weights=_library_args(scheme.weights),
        input_activations=None if scheme.activations is None else _library_args(scheme.activations),
        output_activations=None if scheme.outputs is None else _library_args(scheme.outputs),
        format=CompressionFormat(storage_format(scheme)),
    )


def _library_args(grid: QuantGrid) -> QuantizationArgs:
    if grid.kind != "int":
        return float_args(grid)
    grouped = isinstance(grid.group, int)
    return QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType.INT,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.GROUP if grouped else QuantizationStrategy(grid.group),
        group_size=grid.group if grouped else None,
        dynamic=grid.dynamic,
    )


def _own_scheme(group: QuantizationScheme) -> Scheme:
    container = CompressionFormat(group.format).value
    if container not in READABLE_FORMATS:
        raise UserError(
            f"format {container} is not read", "quantization_config", f"known: {', '.join(READABLE_FORMATS)}"
        )
    inputs, outputs = (args and _own_grid(args) for args in (group.input_activations, group.output_activations))
    scheme = Scheme(_own_grid(group.weights), inputs, outputs)
    return loadable(scheme, unpacks=container != INT_QUANTIZED)


def _own_grid(args: QuantizationArgs) -> QuantGrid:
    if args.type == QuantizationType.FLOAT:
        return float_grid(args)
    if args.type != QuantizationType.INT or args.strategy not in ("tensor", "channel", "token", "group"):
        raise UserError(
            f"{args.type} codes per {args.strategy} are not read",
            "quantization_config",
            "use integers per tensor, channel, token or group",
        )
    group = args.group_size if args.strategy == "group" else args.strategy
    return QuantGrid(args.num_bits, args.symmetric, group, bool(args.dynamic))


def _pack_codes(codes: Tensor, levels: Levels, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    if scheme.weights.kind != "int":
        return pack_floats(scheme.weights.kind, codes, levels, dtype)
    scales = pack_levels("weight", scheme.weights, levels, dtype)
    if storage_format(scheme) == INT_QUANTIZED:
        return {"weight": codes} | scales
    packed = torch.cat([pack_to_int32(part, scheme.weights.bits) for part in codes.split(_PACKED_ROWS)])
    return {"weight_packed": packed, "weight_shape": torch.tensor(codes.shape)} | scales
