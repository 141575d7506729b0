"""Loads a checkpoint folder as a transformers model.

Dense and sparse folders go through ``from_pretrained``. So do quantized ones with ``runtime="dense"``: transformers
widens their weights at the first forward and rounds the activations of every later one. Otherwise the quantized
matrices are held as they are stored, by modules that multiply them so (`llmcompress.runtime.assemble`)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.arithmetic import choose_device
from llmcompress.errors import UserError, nearest
from llmcompress.export.destination import refuse_network, refuse_packed
from llmcompress.runtime.summary import RUNTIMES, SEMI_STRUCTURED, RuntimeSummary, StaysDense, require_kernel

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    runtime: str = "auto",
) -> PreTrainedModel:
    """The causal language model of ``folder``, in evaluation mode. `runtime_of` tells how it multiplies.

    Args:
        folder: a checkpoint folder, compressed or not.
        dtype: e.g. ``torch.bfloat16`` or ``"bfloat16"``; that of the checkpoint if None.
        device: where to put it.
        runtime: ``auto`` multiplies each quantized matrix by the integer kernel there is for its scheme, and warns of
            those for which there is none; ``int8`` and ``int4`` use that kernel only; ``2:4`` takes torch's prototype
            of semi-structured tensors for weights of that pattern, in an unquantized folder on CUDA; ``dense`` leaves
            everything to transformers, which widens the weights at the first forward.

    Raises:
        UserError: no CUDA device, no folder, no checkpoint in it, pickle weights only, a missing or damaged shard, an
            unknown dtype or runtime, or a kernel asked for by name that no matrix of the folder can use.
    """
    folder, device = Path(folder), torch.device(device)
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}'", "runtime", nearest(runtime, RUNTIMES))
    choose_device(device.type)
    check_checkpoint(folder)
    model, summary = _with_kernels(folder, _dtype(dtype), device, runtime)
    if model is None:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(dtype) or "auto", local_files_only=True)
        except ImportError as error:  # bitsandbytes, gptqmodel, optimum
            raise UserError(f"transformers cannot load it ({error})", str(folder), "install what is missing") from error
        model = model.to(device)
        if runtime == SEMI_STRUCTURED:
            summary = _semi_structured(model, folder)
    if (summary.reasons or summary.whole) and runtime != "dense":
        warnings.warn(f"{folder}: {summary.text()}", StaysDense, stacklevel=2)
    model.llmcompress_runtime = summary
    return model.eval()


def runtime_of(model: nn.Module) -> RuntimeSummary:
    """How the matrices of a model from `load` are multiplied.

    Raises:
        ValueError: ``load`` did not make it.
    """
    found = getattr(model, "llmcompress_runtime", None)
    if not isinstance(found, RuntimeSummary):
        raise ValueError("not a model that llmcompress.load made")
    return found


def _with_kernels(
    folder: Path, dtype: torch.dtype | None, device: torch.device, runtime: str
) -> tuple[PreTrainedModel | None, RuntimeSummary]:
    """The model with kernels in it, None where transformers is to load it, and how its matrices are multiplied."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    summary = RuntimeSummary()
    if runtime == SEMI_STRUCTURED and config:
        raise UserError("is quantized; 2:4 products are for floating-point weights", str(folder), "use runtime auto")
    if runtime == SEMI_STRUCTURED:
        return None, summary
    if runtime == "dense" or not config:
        require_kernel(summary, runtime, str(folder))
        return None, summary
    from llmcompress.runtime.assemble import assemble

    try:
        return assemble(folder, dtype, str(device), runtime)
    except UserError as error:
        if runtime != "auto":
            raise
        summary.whole = error.what
        return None, summary


def _semi_structured(model: PreTrainedModel, folder: Path) -> RuntimeSummary:
    from llmcompress.runtime.semi_structured import hold_semi_structured

    summary = hold_semi_structured(model)
    require_kernel(summary, SEMI_STRUCTURED, str(folder))
    return summary


def check_checkpoint(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, each opened once to see that it is whole.

    Raises:
        UserError: as ``load``.
    """
    where = str(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where, "give the folder of a checkpoint")
    refuse_network(folder)
    refuse_packed(folder)
    if not (folder / "config.json").is_file():
        raise UserError("no config.json in it", where, "give the folder of a checkpoint")
    shards = _shards(folder)
    if not shards:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(f"holds pickle weights only ({pickles[0]})", where, "convert them to safetensors first")
        raise UserError("no safetensors weights in it", where, "give the folder of a checkpoint")
    for shard in shards:
        _check_shard(shard)
    return shards


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError("not a shard index", str(index), "download or write the checkpoint again") from error
        return [folder / name for name in sorted(set(names))]
    return [single] if single.is_file() else []


def _check_shard(shard: Path) -> None:
    if not shard.is_file():
        raise UserError("missing, though the index names it", str(shard), "download or write the checkpoint again")
    try:
        with safe_open(shard, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"damaged ({error})", str(shard), "download or write the checkpoint again") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise UserError(f"unknown dtype '{dtype}'", "dtype", "use float32, bfloat16 or float16")
    return named
