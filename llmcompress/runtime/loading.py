"""Loads a checkpoint folder as a transformers model.

Dense, sparse and compressed-tensors folders alike go through ``from_pretrained``; transformers keeps quantized weights
compressed and dequantizes them at the first forward, rounding the activations of every later one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import UserError, nearest

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


#: how the quantized matrices of a folder are multiplied
RUNTIMES = ("auto", "int8", "int4", "dense")


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    runtime: str = "auto",
) -> PreTrainedModel:
    """The causal language model of ``folder``, in evaluation mode.

    Args:
        folder: a checkpoint folder, compressed or not.
        runtime: one of RUNTIMES.
        dtype: e.g. ``torch.bfloat16`` or ``"bfloat16"``; that of the checkpoint if None.
        device: where to put it.

    Raises:
        UserError: no folder, no checkpoint in it, pickle weights only, a missing or damaged shard, an unknown dtype or
            runtime.
    """
    folder = Path(folder)
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}'", "runtime", nearest(runtime, RUNTIMES))
    if runtime in ("int8", "int4"):
        raise UserError(f"no {runtime} kernels", "runtime", "use auto or dense")
    check_checkpoint(folder)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(dtype), local_files_only=True)
    return model.to(device).eval()


def check_checkpoint(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, each opened once to see that it is whole.

    Raises:
        UserError: as ``load``.
    """
    where = str(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where, "give the folder of a checkpoint")
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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise UserError(f"unknown dtype '{dtype}'", "dtype", "use float32, bfloat16 or float16")
    return named
