"""Which tensor on disk is which parameter: transformers' own conversion table, read name by name.

Experts are the one case in which a parameter is not a tensor: a checkpoint keeps one for each, as most do, or one
that holds them all, from which parameters are cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from llmcompress.errors import UserError
from llmcompress.export.gptq import PARTS as GPTQ_PARTS
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.experts import Cut, ExpertLayer, Stack
from llmcompress.model.matrix import is_matrix

QUANTIZED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    *GPTQ_PARTS,
)


@dataclass(frozen=True)
class SourceNames:
    """Names on disk.

    Attributes:
        by_parameter: parameter (or ``module.weight_scale`` …) → names on disk: one, or several that are joined along
            their first axis, in order.
        cuts: of the parameters that are part of a tensor on disk.
    """

    by_parameter: dict[str, list[str]]
    cuts: dict[str, Cut]

    @staticmethod
    def of(model: PreTrainedModel, layers: Sequence[ExpertLayer], checkpoint: Checkpoint) -> SourceNames:
        """Matches every tensor of the checkpoint with a parameter.

        Args:
            model: as transformers made it, its experts stacked.
            layers: where these are; they count as a parameter for each expert.

        Raises:
            UserError: transformers would merge tensors in a way that is not known here.
        """
        return _Matching(model, layers, checkpoint).run()

    def stacked(self, layer: ExpertLayer) -> bool:
        """Whether the checkpoint keeps the layer's experts stacked."""
        return layer.own_name(layer.stacks[0], 0, 0) in self.cuts


def split_quantized(source: str) -> tuple[str, str]:
    """``a.weight_scale`` → (``a.weight``, ``weight_scale``); other names → (name, "")."""
    for suffix in QUANTIZED_SUFFIXES:
        if source.endswith("." + suffix):
            return source.removesuffix(suffix) + "weight", suffix
    return source, ""


class _Matching:
    def __init__(self, model: PreTrainedModel, layers: Sequence[ExpertLayer], checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.renamings: list[WeightRenaming] = []
        self.converters: list[WeightTransform] = []
        self.known = dict(model.state_dict(keep_vars=True))
        self.known |= {name: True for layer in layers for name in layer.own_names()}
        self.stacks = {name: (layer, stack, bias) for layer in layers for name, stack, bias in layer.parameters()}
        self.names: dict[str, list[str]] = defaultdict(list)
        self.cuts: dict[str, Cut] = {}
        self.joined: dict[str, dict[int, str]] = defaultdict(dict)

    def run(self) -> SourceNames:
        quantized = "quantization_config" in self.checkpoint.config
        split = {s: split_quantized(s) if quantized else (s, "") for s in self.checkpoint.tensors}
        if self.stacks or any(stem not in self.known for stem, _ in split.values()):
            self._read_table()
        for source, (stem, suffix) in split.items():
            target, pattern = rename_source_key(
                stem, self.renamings, self.converters, self.model.base_model_prefix, self.known  # type: ignore[arg-type]
            )  # fmt: skip
            if target not in self.known:
                continue
            if target in self.stacks and pattern is None:
                self._cut(target, source)
                continue
            if pattern is not None and self._join(target, source, pattern):
                continue
            if pattern is not None:
                target = self._expert(source, stem, target, pattern)
            self.names[target.removesuffix("weight") + suffix if suffix else target].append(source)
        for target, parts in self.joined.items():
            self.names[target] = [parts[number] for number in sorted(parts)]
        return SourceNames(dict(self.names), self.cuts)

    def _read_table(self) -> None:
        """Has transformers build its table of all architectures, which takes a third of a second: where every tensor
        has a parameter's own name, nothing in it applies."""
        transforms = get_model_conversion_mapping(self.model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def _cut(self, target: str, source: str) -> None:
        """Every expert's share of a stacked tensor."""
        layer, stack, bias = self.stacks[target]
        for expert in range(layer.experts):
            for number in range(len(stack.linears)):
                name = layer.own_name(stack, expert, number, bias)
                self.names[name].append(source)
                self.cuts[name] = Cut(stack, expert, layer.experts, number)

    def _join(self, target: str, source: str, pattern: str) -> bool:
        """Notes a part of a tensor that is not a matrix's and is joined from several along its first axis; False if it
        is something else."""
        owner = self.model.get_submodule(target.rpartition(".")[0])
        if target in self.stacks or is_matrix(owner):
            return False
        for converter in self.converters:
            if isinstance(converter, WeightConverter) and pattern in converter.source_patterns:
                (operation, *others) = converter.operations
                if others or not isinstance(operation, Concatenate) or operation.dim != 0:
                    return False
                self.joined[target][converter.source_patterns.index(pattern)] = source
                return True
        return False

    def _expert(self, source: str, stem: str, target: str, pattern: str) -> str:
        """The parameter of one expert, of which ``source`` is the tensor."""
        layer, stack, bias = self.stacks.get(target, (None, None, False))
        number = self._number(stack, pattern) if stack else None
        digits = [part for part in stem.split(".") if part.isdigit()]
        if layer is None or stack is None or number is None or not digits:
            raise UserError(
                f"{source} is merged into {target} when transformers loads it", str(self.checkpoint.folder),
                f"the layout of {type(self.model).__name__} is not supported yet",
            )  # fmt: skip
        return layer.own_name(stack, int(digits[-1]), number, bias)

    def _number(self, stack: Stack, pattern: str) -> int | None:
        """Which matrix of an expert the converter with this source pattern merges; None if it does more than stacking
        experts and putting their matrices side by side."""
        for converter in self.converters:
            if not isinstance(converter, WeightConverter) or pattern not in converter.source_patterns:
                continue
            plain = all(
                isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == 1)
                for op in converter.operations
            )
            whole = len(converter.source_patterns) == len(stack.linears) and not (stack.transposed or stack.interleaved)
            return converter.source_patterns.index(pattern) if plain and whole else None
        return None
