"""What operators of an exported graph do to channels, by their names in ATen."""

from __future__ import annotations

import torch
from torch import fx

#: move entries, or repeat them
MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
    "expand_as", "repeat", "cat", "concat", "concatenate", "stack", "chunk", "unbind", "movedim", "flip", "roll",
    "unflatten", "pixel_shuffle", "view_as", "reshape_as",
}  # fmt: skip
#: take some of the entries along one axis
CUTS = {"slice", "select", "split", "split_with_sizes", "narrow"}
#: entry by entry, though not tagged so
SAME = {
    "dropout", "feature_dropout", "clone", "contiguous", "to", "_to_copy", "alias", "detach", "lift_fresh_copy",
    "relu6", "type_as", "hardswish", "log_sigmoid",
}  # fmt: skip
#: of the last two axes
POOLS = {
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d",
    "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact2d",
}  # fmt: skip
#: over axes that they are given
REDUCTIONS = {"mean", "sum", "amax", "amin"}


def is_pointwise(node: fx.Node, name: str) -> bool:
    """Whether an operator makes each entry of the same entries of its inputs."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags:
        return True
    functional = getattr(torch.ops.aten, name, None)
    return functional is not None and any(
        torch.Tag.pointwise in getattr(functional, overload).tags for overload in functional.overloads()
    )
