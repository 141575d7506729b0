"""A model whose decoder blocks are empty until they are needed.

The skeleton has the real modules without storage. Embeddings, final norm and, if logits are wanted, the head are read
when forwards start, blocks one by one. Names are translated by transformers' own conversion table, so checkpoints saved
under other names load too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from llmcompress.core.grid import Levels
from llmcompress.errors import UserError
from llmcompress.export import gptq
from llmcompress.export.quantized import Scheme, schemes_of, unpack, unpack_activations
from llmcompress.model.blocks import find_blocks
from llmcompress.model.checkpoint import Checkpoint, require_finite
from llmcompress.model.experts import StackedLinear, find_experts, find_routers, unstack
from llmcompress.model.initialization import unpacks
from llmcompress.model.names import QUANTIZED_SUFFIXES, SourceNames, split_quantized
from llmcompress.model.plausible import BoundedFactories, require_plausible
from llmcompress.suspend import SuspendedForward


@dataclass(frozen=True)
class Block:
    """A decoder block: its dotted name and module."""

    name: str
    module: nn.Module


class BlockwiseModel:
    """A causal language model read from a checkpoint, block by block.

    Attributes:
        model: the transformers module; parameters that are not loaded are on the meta device.
        blocks: in order.
        dtype: floating dtype of the arithmetic; stored weights are converted to it.
        schemes: of quantized matrices by module name; empty for a dense checkpoint.
        unpacks: whether transformers can load packed weights of this architecture.
        routers: names of the matrices that choose between experts.
        expert_layers: names of the modules that hold experts.
        joins: whether some of its parameters are joined from several tensors.
        cuts: by parameter name, where it lies in a tensor that holds all experts.
        input_levels: of static input grids by module name, for blocks loaded so far.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.trust_remote_code = trust_remote_code
        self.model = _skeleton(checkpoint, dtype, trust_remote_code)
        experts = find_experts(self.model)
        self.routers, self.expert_layers = find_routers(self.model, experts), tuple(layer.name for layer in experts)
        names = SourceNames.of(self.model, experts, checkpoint)
        for layer in experts:
            unstack(layer, names.stacked(layer))
        self.source_names, self.cuts = names.by_parameter, names.cuts
        self.joins = any(len(sources) > 1 for sources in self.source_names.values())
        self.blocks = [Block(name, module) for name, module in find_blocks(self.model)]
        self.unpacks = unpacks(self.model, [self.blocks[0].module, self.blocks[-1].module], self.routers)
        self.schemes = self._read_schemes()
        self.input_levels: dict[str, Levels] = {}
        self._require_complete()
        self._prefixes = tuple(block.name + "." for block in self.blocks)
        self._place_buffers()
        self.model.eval().requires_grad_(False)

    def load_block(self, index: int) -> Block:
        """Materialises one block's weights.

        Raises:
            UserError: a weight holds NaN or infinity.
        """
        block = self.blocks[index]
        self._load({f"{block.name}.{name}" for name, _ in block.module.named_parameters()})
        return block

    def fill_block(self, index: int, tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> None:
        """Materialises one block as a checkpoint that holds these tensors would be read.

        Args:
            tensors: all of the block's, by name on disk.
            schemes: of its quantized matrices, by module name; they are noted as this model's.
        """
        block = self.blocks[index]
        self.schemes |= schemes
        for name, _ in list(block.module.named_parameters()):
            parameter = f"{block.name}.{name}"
            module, _, attribute = parameter.rpartition(".")
            sources = self.source_names.get(parameter)
            if module in schemes and attribute == "weight":
                stem = (parameter if parameter in self.cuts else self.disk_name(parameter)).removesuffix("weight")
                value = self._unpack(module, {s[len(stem) :]: t for s, t in tensors.items() if s.startswith(stem)})
            elif parameter in tensors:
                value = self._in_working_dtype(tensors[parameter])
            elif sources:
                value = torch.cat([tensors[source] for source in sources]) if len(sources) > 1 else tensors[sources[0]]
                cut = self.cuts.get(parameter)
                value = self._in_working_dtype(value if cut is None else cut.view(value).clone())
            else:  # tied to another one
                continue
            self._put(module, attribute, value)

    def release_block(self, index: int) -> None:
        """Frees one block's weights."""
        release(self.blocks[index].module)

    def twin(self) -> BlockwiseModel:
        """Another model of the same checkpoint, with its own copy of each block."""
        return BlockwiseModel(self.checkpoint, self.dtype, self.device, self.trust_remote_code)

    def load_rest(self, head: bool) -> None:
        """Materialises what lies outside the blocks, the output head only if it is wanted."""
        wanted = self.model if head else self.model.base_model
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        absent = {id(p) for p in wanted.parameters() if p.device.type == "meta"} - inside
        self._load({name for name, p in self.model.named_parameters() if id(p) in absent})
        self.model.tie_weights()

    def release_embeddings(self) -> None:
        """Frees the token embeddings, and the head with them, once every forward is past them."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if module is not None:
                release(module)

    def start_forwards(
        self, batches: list[Tensor], head: bool = False,
        kind: Callable[[Callable[[], Any]], SuspendedForward] = SuspendedForward,
    ) -> list[SuspendedForward]:  # fmt: skip
        """One forward of the whole model per (B, T) batch of token ids, each waiting at the first block.

        Args:
            head: go on to the logits after the last block, (B, T, V); otherwise the result is None.
            kind: what makes the forwards.
        """

        self.load_rest(head)

        def forward_of(ids: Tensor) -> Callable[[], Tensor | None]:
            network = self.model if head else self.model.base_model
            ids = ids.to(self.device)

            def run() -> Tensor | None:
                output = network(input_ids=ids, use_cache=False)
                return output.logits if head else None

            return run

        forwards = [kind(forward_of(ids)) for ids in batches]
        for forward in forwards:
            forward.resume()
        return forwards

    def block_sources(self, index: int) -> list[str]:
        """Names on disk of the tensors that make up one block."""
        prefix = self._prefixes[index]
        sources = (s for target, found in self.source_names.items() if target.startswith(prefix) for s in found)
        return list(dict.fromkeys(sources))  # many parameters are cut from one stacked tensor

    def rest_sources(self) -> list[str]:
        """Names on disk of every tensor outside the blocks, those the model does not use among them."""
        in_blocks = {name for i in range(len(self.blocks)) for name in self.block_sources(i)}
        return [name for name in self.checkpoint.tensors if name not in in_blocks]

    def disk_name(self, parameter: str) -> str:
        """The name on disk of a parameter ``module.weight``."""
        return self.source_names[parameter][0]

    @property
    def linears(self) -> list[str]:
        """Names of every Linear."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def stored_name(self, module: str) -> str:
        """How a checkpoint's configuration calls a matrix: as transformers does, but an expert as its tensors are."""
        if not self.expert_layer(module) or isinstance(self.model.get_submodule(module), StackedLinear):
            return module
        own = (self.source_names.get(f"{module}.{suffix}") for suffix in ("weight", *QUANTIZED_SUFFIXES))
        sources = next(found for found in own if found)
        return split_quantized(sources[0])[0].removesuffix(".weight")

    def configurable(self) -> dict[str, str]:
        """Name in quantization_config → module, of every Linear it may mean; GPTQ's names none: those packed."""
        packed = [name for name in self.linears if f"{name}.qweight" in self.source_names]
        return {self.stored_name(name): name for name in packed or self.linears}

    def stored_tensors(self, module: str) -> dict[str, Tensor]:
        """What is stored of a quantized matrix, by name within it (``weight_scale`` …), its bias left out."""
        own = {suffix: self.source_names.get(f"{module}.{suffix}") for suffix in ("weight", *QUANTIZED_SUFFIXES)}
        parts = {suffix: sources[0] for suffix, sources in own.items() if sources}
        read = self.checkpoint.read(parts.values())
        tensors = {suffix: read[source] for suffix, source in parts.items()}
        return gptq.unpack(tensors, self.checkpoint.config["quantization_config"]) if "qweight" in tensors else tensors

    def expert_layer(self, module: str) -> str:
        """The name of the module of experts that a matrix belongs to; empty if it is none of theirs."""
        return next((name for name in self.expert_layers if module.startswith(name + ".")), "")

    def merges_expert(self, module: str) -> bool:
        """Whether transformers stacks the tensors of this matrix with those of other experts when it loads them."""
        return bool(self.expert_layer(module)) and f"{module}.weight" not in self.cuts

    def _read_schemes(self) -> dict[str, Scheme]:
        quantization: dict[str, Any] | None = self.checkpoint.config.get("quantization_config")
        if not quantization:
            return {}
        stored = self.configurable()
        return {stored[name]: scheme for name, scheme in schemes_of(quantization, stored).items()}

    def _require_complete(self) -> None:
        """Every parameter has its tensor on disk, of the shape config.json promises: told before anything is read."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] in self.schemes and name.endswith(".weight"):
                continue
            if name not in self.source_names:
                if name in tied:
                    continue
                raise UserError("the checkpoint lacks this weight", name, "give a complete checkpoint")
            found, cut = [self.checkpoint.tensors[source] for source in self.source_names[name]], self.cuts.get(name)
            info, shape = found[0], found[0].shape
            if len(found) > 1:
                shape = (sum(part.shape[0] for part in found), *shape[1:])
            if cut and cut.fits(shape, tuple(parameter.shape)):
                continue
            if shape != tuple(parameter.shape):
                shapes = f"has the shape {shape}, config.json says {tuple(parameter.shape)}"
                raise UserError(shapes, name, "give the config.json that belongs to the weights")
            if not info.dtype.is_floating_point:
                raise UserError(f"stored as {info.dtype}", name, "give the dense checkpoint")

    def _load(self, parameters: set[str]) -> None:
        """Reads parameters from disk, converts them to the working dtype and puts them into their modules."""
        for name in sorted(parameters):
            module_name, _, attribute = name.rpartition(".")
            if module_name in self.schemes and attribute == "weight":
                value = self._read_quantized(module_name)
            elif name in self.source_names:
                value = self._read_one(name)
            else:  # tied to another one
                continue
            self._put(module_name, attribute, value)

    def _put(self, module: str, attribute: str, value: Tensor) -> None:
        owner = self.model.get_submodule(module)
        setattr(owner, attribute, nn.Parameter(value.to(self.device), requires_grad=False))

    def _read_one(self, name: str) -> Tensor:
        sources, cut = self.source_names[name], self.cuts.get(name)
        source = sources[0]
        if cut is None:
            parts = self.checkpoint.read(sources)
            value = torch.cat([parts[part] for part in sources]) if len(sources) > 1 else parts[source]
        else:
            rows = self.checkpoint.tensors[source].shape[0]
            value = cut.read(lambda first, last: self.checkpoint.read_rows(source, first, last), rows)
        require_finite(name, value)
        return self._in_working_dtype(value)

    def _in_working_dtype(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _read_quantized(self, module: str) -> Tensor:
        return self._unpack(module, self.stored_tensors(module))

    def _unpack(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        levels = unpack_activations(tensors)
        if levels is not None:
            self.input_levels[module] = levels
        return unpack(tensors, self.schemes[module]).dequantize().to(self.dtype)

    def _place_buffers(self) -> None:
        """Persistent buffers come from the checkpoint, the others were computed with the skeleton."""
        for name, buffer in list(self.model.named_buffers()):
            value = self._read_one(name) if name in self.source_names else buffer
            owner_name, _, attribute = name.rpartition(".")
            self.model.get_submodule(owner_name)._buffers[attribute] = value.to(self.device)


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    require_plausible(checkpoint.config, len(checkpoint.tensors), str(checkpoint.folder / "config.json"))
    largest = max(math.prod(info.shape) for info in checkpoint.tensors.values())
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False), no_init_weights(), BoundedFactories(largest):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks little: what does not fit raises whatever it runs into
        raise UserError(
            f"transformers cannot build this model: {' '.join(str(error).split())[:300] or type(error).__name__}",
            str(checkpoint.folder), "check config.json; custom code needs --trust-remote-code",
        ) from error  # fmt: skip


def release(module: nn.Module) -> None:
    """Frees a module's parameters. Buffers stay: they are small, and not all of them could be read again."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def micro_batches(tokens: Tensor, limit: int = 2048) -> list[Tensor]:
    """Rows in batches of about ``limit`` tokens: large enough for full-speed matrix products."""
    return list(tokens.split(max(1, limit // tokens.shape[1])))
