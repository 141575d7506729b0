"""A transformers model around the compressed tensors: block by block, each matrix goes from the safetensors file into
its kernel's packing, with no dense copy in between. What is held at once beside the growing model is one matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llmcompress.errors import UserError
from llmcompress.export import gptq
from llmcompress.export.quantized import Scheme
from llmcompress.measure import release_file_pages, release_freed_memory, release_mapped
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.runtime.choose import choose
from llmcompress.runtime.cuda import Float8CudaLinear, Int8CudaLinear
from llmcompress.runtime.int4 import W4A16Linear
from llmcompress.runtime.simulated import simulate
from llmcompress.runtime.summary import RuntimeSummary, require_kernel


def survey(model: BlockwiseModel, runtime: str, device: str) -> tuple[dict[str, str], RuntimeSummary]:
    """The kernel of each quantized matrix by module name, and what it comes to."""
    kernels, summary = {}, RuntimeSummary()
    for name, scheme in model.schemes.items():
        linear = model.model.get_submodule(name)
        kernels[name], why = choose(scheme, linear.out_features, linear.in_features, runtime, device)
        summary.kernels[kernels[name]] += 1
        if why:
            summary.reasons[why] += 1
    return kernels, summary


def assemble(
    folder: Path, dtype: torch.dtype | None, device: str, runtime: str
) -> tuple[PreTrainedModel | None, RuntimeSummary]:
    """The model of a quantized folder with a kernel in each matrix that has one; None if no matrix has. What is in
    GPTQ's layout is read in any case: transformers wants two more packages for it.

    Args:
        folder: with a ``quantization_config`` this program reads.
        dtype: of what stays in floating point; that of the checkpoint if None.
        device: where it will run.
        runtime: one of RUNTIMES.

    Raises:
        UserError: the folder cannot be read, or no matrix can use the kernel asked for.
    """
    checkpoint = Checkpoint(folder)
    model = BlockwiseModel(checkpoint, dtype or checkpoint.dtype, device)
    kernels, summary = survey(model, runtime, device)
    require_kernel(summary, runtime, str(folder))
    if not summary.kernels.keys() - {"dense"} and not gptq.is_layout(checkpoint.config):
        return None, summary
    with torch.no_grad():
        _map_embedding(model)
        for index, block in enumerate(model.blocks):
            inside = [name for name in kernels if name.startswith(block.name + ".")]
            _fill(model, {name: kernels.pop(name) for name in inside}, partial(model.load_block, index))
        _fill(model, kernels, partial(model.load_rest, head=True))
    # As from_pretrained leaves them. Without it torch's matmul copies the head for a hidden state that is a slice.
    network = model.model.requires_grad_(True)
    _try(network, folder)
    if (folder / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    release_file_pages()  # a compiler and half of torch were read to get here
    return network, summary


@torch.no_grad()
def _try(network: PreTrainedModel, folder: Path) -> None:
    """Two tokens, so that a model whose code reads the weights of its Linears (RWKV's does) is found now, and what the
    kernels of several rows compile is compiled before the compiler's pages are given back."""
    try:
        network(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=network.device))
    except AttributeError as error:
        raise UserError(f"its code reads the weights themselves ({error})", str(folder), "use runtime dense") from error


def _map_embedding(model: BlockwiseModel) -> None:
    """Leaves the table of token embeddings in its file, from which rows are paged in as they are looked up, unless the
    head multiplies it too or it is to be converted."""
    table, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    name = next(name for name, module in model.model.named_modules() if module is table) + ".weight"
    if model.device != "cpu" or name not in model.source_names or head is None or head.weight is table.weight:
        return
    info = model.checkpoint.tensors[model.source_names[name][0]]
    if info.dtype != model.dtype or name in model.cuts or getattr(model.model.config, "tie_word_embeddings", False):
        return
    with safe_open(model.checkpoint.folder / info.file, framework="pt") as handle:
        mapped = handle.get_tensor(model.source_names[name][0])
    table.weight = nn.Parameter(mapped, requires_grad=False)
    table.register_forward_hook(_unmap_rows)


def _unmap_rows(table: nn.Module, given: tuple[Tensor, ...], rows: Tensor) -> None:
    """Takes the rows that were looked up out of memory: with each, the system mapped 64 KiB around it. A table that
    somebody changed is left alone."""
    if isinstance(table.weight, Tensor) and table.weight._version == 0:
        release_mapped(table.weight)


def _fill(model: BlockwiseModel, kernels: dict[str, str], load_others: Callable[[], object]) -> None:
    """Puts the kernels' Linears into their places, reads what else belongs there, and has inputs rounded where a
    quantized matrix stayed dense."""
    for name, kernel in kernels.items():
        if kernel != "dense":
            _replace(model, name, kernel)
    load_others()
    for name, kernel in kernels.items():
        if kernel == "dense":
            simulate(model.model.get_submodule(name), model.schemes[name], model.input_levels.get(name))
    release_freed_memory()


def _replace(model: BlockwiseModel, name: str, kernel: str) -> None:
    """Puts the kernel's Linear in the place of the empty one, whose bias it keeps."""
    parent, _, attribute = name.rpartition(".")
    bias = model.model.get_submodule(name).bias
    linear = _linear(kernel, model.stored_tensors(name), model.schemes[name], bias, model.device)
    setattr(model.model.get_submodule(parent), attribute, linear)


def _linear(
    kernel: str, tensors: dict[str, Tensor], scheme: Scheme, bias: nn.Parameter | None, device: str
) -> nn.Module:
    if kernel == "int4":
        return W4A16Linear(tensors, scheme, bias)
    if kernel == "fp8":
        return Float8CudaLinear(tensors, scheme, bias, device)
    if device != "cpu":
        return Int8CudaLinear(tensors, scheme, bias, device)
    from llmcompress.runtime.int8 import W8A8Linear  # here, as it brings a compiler into the process

    return W8A8Linear(tensors, scheme, bias)
