"""What a model is computed on and in: the device and the dtype that ``auto`` stands for."""

from __future__ import annotations

import torch

from llmcompress.errors import UserError
from llmcompress.model.checkpoint import Checkpoint

#: below this many parameters arithmetic on a CPU is float32 whatever the checkpoint stores
SMALL_MODEL = 500_000_000


def choose_device(wanted: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        UserError: there is no CUDA device, and one is wanted.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("no CUDA device is available", "--device cuda", "use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu"


def choose_dtype(wanted: str, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """float32 where it is asked for, stored, or cheap; float16 weights are computed in float32 on a CPU."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    stored = checkpoint.dtype
    if device == "cpu" and (checkpoint.parameters < SMALL_MODEL or stored != torch.bfloat16):
        return torch.float32
    return stored
