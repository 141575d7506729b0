"""The matrices of a checkpoint as they lie on disk: which tensors make one up, and how they decode.

Everything goes by the names on disk, so that folders of other programs can be read too; a skeleton of the model, where
one can be built, adds the modules' names, which of them store (in, out), and which are Linear."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, QuantizationType
from torch import Tensor, nn

from llmcompress.core.grid import QuantGrid
from llmcompress.export import gptq
from llmcompress.export.library import library_schemes
from llmcompress.export.quantized import Scheme, unpack
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.experts import Cut
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.matrix import is_matrix

#: endings of the tensors that make up one matrix
PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", *gptq.PARTS,
)  # fmt: skip
_OWN_FORMATS = (CompressionFormat.int_quantized, CompressionFormat.pack_quantized, CompressionFormat.naive_quantized)
_OWN_STRATEGIES = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix on disk.

    Attributes:
        name: of its module, as the record and quantization_config have it; on disk if the model is not known.
        block: the decoder block's name; empty outside the blocks.
        parts: names on disk by ending.
        transposed: stored (in, out).
        scheme: of a quantized one.
        cut: where it lies in a tensor that holds all experts; None if it has a tensor of its own.
    """

    name: str
    block: str
    parts: Mapping[str, str]
    transposed: bool = False
    scheme: QuantizationScheme | None = None
    cut: Cut | None = None

    def read(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Its tensors by ending; those of GPTQ's layout as compressed-tensors has them."""
        if self.cut is not None:
            name = self.parts["weight"]
            rows = partial(checkpoint.read_rows, name)
            return {"weight": self.cut.read(rows, checkpoint.tensors[name].shape[0])}
        found = checkpoint.read(self.parts.values())
        tensors = {part: found[name] for part, name in self.parts.items()}
        return gptq.unpack(tensors, checkpoint.config["quantization_config"]) if "qweight" in tensors else tensors

    def where(self, part: str) -> str:
        """The name on disk of one of its tensors, of which GPTQ's layout has others than are read."""
        return self.parts.get(part, f"{self.name}.{part}")

    def container(self, tensors: Mapping[str, Tensor]) -> str:
        """What it is stored in: a format of compressed-tensors, ``gptq``, or the dtype of a dense one."""
        if "qweight" in self.parts:
            return "gptq"
        if self.scheme is not None:
            return CompressionFormat(self.scheme.format).value
        return str(tensors["weight"].dtype).removeprefix("torch.")

    def nbytes(self, checkpoint: Checkpoint) -> int:
        """Bytes on disk of all its tensors; of its part of a tensor that holds all experts."""
        whole = sum(checkpoint.tensors[name].nbytes for name in self.parts.values())
        return whole if self.cut is None else whole // (self.cut.experts * len(self.cut.stack.linears))

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What a loader computes with: (out, in) float32, stacked matrices one below the other.

        Raises:
            KeyError, ValueError, RuntimeError: the tensors are not those of the scheme.
        """
        if self.scheme is not None:
            return own_values(self.scheme, tensors) if is_own(self.scheme) else library_values(self.scheme, tensors)
        weight = tensors["weight"].float()
        if weight.dim() == 3:
            return weight.flatten(0, 1)
        return weight.T.contiguous() if self.transposed else weight.flatten(1)


def is_own(scheme: QuantizationScheme) -> bool:
    """Whether this program's own reading covers the scheme."""
    weights = scheme.weights
    plain = weights.type == QuantizationType.INT and weights.strategy in _OWN_STRATEGIES and not weights.actorder
    packed = scheme.format == CompressionFormat.pack_quantized
    return plain and scheme.format in _OWN_FORMATS and (weights.symmetric or not packed)


def own_grid(scheme: QuantizationScheme) -> QuantGrid:
    """The grid of a scheme that ``is_own``."""
    weights = scheme.weights
    strategy = QuantizationStrategy(weights.strategy)
    group = weights.group_size if strategy == QuantizationStrategy.GROUP else strategy.value
    return QuantGrid(weights.num_bits, weights.symmetric, group)


def own_values(scheme: QuantizationScheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """(out, in) float32 by this program's own reading."""
    return unpack(tensors, Scheme(own_grid(scheme))).dequantize()


def library_values(scheme: QuantizationScheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """(out, in) float32 by the compressed-tensors library."""
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)
    weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight.float()


def matrices_of(checkpoint: Checkpoint, model: BlockwiseModel | None) -> list[StoredMatrix]:
    """Every matrix of a checkpoint in the order of its blocks, and then those outside them.

    Raises:
        UserError: the quantization_config is not one of compressed-tensors or GPTQ's layout.
    """
    stacked = {sources[0] for name, sources in model.source_names.items() if name in model.cuts} if model else set()
    parts: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        stem, _, ending = name.rpartition(".")
        if stem and ending in PARTS and name not in stacked:
            parts.setdefault(stem, {})[ending] = name
    names = _module_names(model)
    schemes = _schemes(checkpoint, model, [names.get(stem, stem) for stem in parts], parts)
    transposed = _transposed(model)
    found = list(_experts(model)) if model is not None else []
    for stem, own in parts.items():
        name = names.get(stem, stem)
        if name in schemes or ("weight" in own and len(checkpoint.tensors[own["weight"]].shape) >= 2):
            found.append(StoredMatrix(name, block_of(name, model), own, name in transposed, schemes.get(name)))
    return sorted(found, key=lambda m: (not m.block, _natural(m.block)))


def block_of(name: str, model: BlockwiseModel | None) -> str:
    """The decoder block a module lies in: by the model, or up to the first number in its name."""
    if model is not None:
        stem = model.blocks[0].name.rpartition(".")[0]
        found = re.match(re.escape(stem) + r"\.\d+(?=\.)", name)
        return found[0] if found else ""
    guessed = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return guessed[0] if guessed else ""


def _experts(model: BlockwiseModel) -> Iterator[StoredMatrix]:
    """The matrices that are parts of a tensor with all experts."""
    for parameter, cut in model.cuts.items():
        name, _, ending = parameter.rpartition(".")
        if ending == "weight":
            parts = {"weight": model.source_names[parameter][0]}
            yield StoredMatrix(name, block_of(name, model), parts, cut=cut)


def _module_names(model: BlockwiseModel | None) -> dict[str, str]:
    """Stem on disk → module name, where the model tells."""
    names = {}
    for target, sources in model.source_names.items() if model is not None else ():
        module, _, ending = target.rpartition(".")
        for source in sources if ending in PARTS and len(sources) == 1 else ():
            names[source.rpartition(".")[0]] = module
    return names


def _schemes(
    checkpoint: Checkpoint, model: BlockwiseModel | None, names: list[str], parts: Mapping[str, Mapping[str, str]]
) -> dict[str, QuantizationScheme]:
    config = checkpoint.config.get("quantization_config")
    if not config:
        return {}
    if model is not None:
        stored = model.configurable()
        return {stored[name]: scheme for name, scheme in library_schemes(config, stored).items()}
    # what carries scales is a Linear, or was taken for one
    return library_schemes(config, [n for n, own in zip(names, parts.values(), strict=True) if own.keys() - {"weight"}])


def _transposed(model: BlockwiseModel | None) -> set[str]:
    modules = model.model.named_modules() if model is not None else ()
    return {name for name, m in modules if is_matrix(m) and not isinstance(m, nn.Linear) and m.weight.dim() == 2}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def row_slices(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The first rows of a quantized matrix, as if they were the whole."""
    total = tensors["weight_packed" if "weight_packed" in tensors else "weight"].shape[0]
    cut = {p: t[:rows] if t.dim() > 1 and t.shape[0] == total else t for p, t in tensors.items()}
    if "weight_shape" in cut:
        cut["weight_shape"] = cut["weight_shape"].clone()
        cut["weight_shape"][0] = min(rows, total)
    return cut
