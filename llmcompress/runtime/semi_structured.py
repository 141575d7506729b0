"""2:4 zeros in half the memory and, on some shapes, less time: torch's semi-structured tensors, on CUDA only.

They are a prototype of torch's and other programs have dropped 2:4, so nothing takes them unless it is asked for by
``runtime="2:4"``, and torch's class is imported then. Each Linear of the blocks whose weight keeps at most two of every
four neighbours is held so; the others stay dense, and why is said. Floating-point weights only: int8 ones go through
the dense integer product. Not run on a GPU so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcompress.model.blocks import find_blocks
from llmcompress.runtime.summary import SEMI_STRUCTURED, RuntimeSummary

#: compute capability from which GPUs have the instruction: Ampere
LEAST_CAPABILITY = (8, 0)
#: of rows and columns; torch wants 32 and 64 at most, whichever library it calls
MULTIPLES = (32, 64)
_DTYPES = (torch.float16, torch.bfloat16)


def why_not_semi_structured(weight: Tensor, capability: tuple[int, int] | None) -> str:
    """Why a weight cannot be held as 2:4; empty if it can.

    Args:
        weight: (out, in).
        capability: of the CUDA device it is on; None if it is on none.
    """
    if capability is None:
        return "2:4 products want a CUDA device"
    if capability < LEAST_CAPABILITY:
        return (
            f"2:4 products want a GPU of compute capability 8.0 or newer, this one has {'.'.join(map(str, capability))}"
        )
    if weight.dtype not in _DTYPES:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    rows, columns = weight.shape
    if rows % MULTIPLES[0] or columns % MULTIPLES[1]:
        return f"{rows} × {columns} are no multiples of {MULTIPLES[0]} × {MULTIPLES[1]}"
    if int(weight.view(rows, -1, 4).count_nonzero(2).max()) > 2:
        return "it keeps more than two of four weights"
    return ""


def hold_semi_structured(model: nn.Module) -> RuntimeSummary:
    """Puts the 2:4 weights of the blocks' Linears into torch's semi-structured tensors, in place."""
    summary = RuntimeSummary()
    for _, block in find_blocks(model):
        for linear in (module for module in block.modules() if type(module) is nn.Linear):
            weight = linear.weight.detach()
            why = why_not_semi_structured(weight, _capability(weight.device))
            if why:
                summary.reasons[why] += 1
            else:
                from torch.sparse import to_sparse_semi_structured

                linear.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
            summary.kernels["dense" if why else SEMI_STRUCTURED] += 1
    return summary


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
