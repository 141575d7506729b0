"""The decoder blocks of a network: its largest list of modules that hold matrices."""

from __future__ import annotations

from torch import nn

from llmcompress.errors import UserError
from llmcompress.model.matrix import is_matrix


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Dotted names and modules of the repeated blocks, in order.

    The list with most parameters whose every element holds a matrix is the one; lists inside it (experts of a
    block, say) are smaller by construction.

    Raises:
        UserError: the model has no such list.
    """
    candidates = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_holds_matrix(element) for element in module)
    ]
    if not candidates:
        raise UserError(
            "no repeated blocks of matrices found", type(model).__name__, "only decoder models are supported"
        )
    _, name, blocks = max(candidates, key=lambda found: found[0])
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def _holds_matrix(module: nn.Module) -> bool:
    return any(is_matrix(m) for m in module.modules())
