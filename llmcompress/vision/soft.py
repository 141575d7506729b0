"""Soft filter pruning (He et al., 2018, arXiv:1808.06866): after every epoch the filters of the smallest norm are
zeroed and trained on, so that they may grow back; what is zero in the end goes. Departure: what is coupled
is zeroed together, and counts are those with which `llmcompress.vision.channels` removes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError
from llmcompress.vision.channels import ChannelOptions, spaces
from llmcompress.vision.graph import channel_graph
from llmcompress.vision.images import Images
from llmcompress.vision.importance import unit_scores

#: importances by which a filter of zeros is the least
NORMS = ("l1", "l2")


class SoftFilters:
    """Zeroes filters each time it is called.

    Args:
        module: changed in place; in evaluation mode now, and in any mode later.
        wanted: how many, by which norm.
        targets: whether a layer may lose channels; a space is zeroed only if all its layers may.
        x: (N, C, H, W), at least two images, to trace the couplings.

    Attributes:
        zeroed: names of layers → channels that were zeroed last.
    """

    def __init__(self, module: nn.Module, wanted: ChannelOptions, targets: Callable[[str], bool], x: Tensor) -> None:
        self.module, self.wanted = module, wanted
        self.graph = channel_graph(module, x)
        self.spaces = [s for s in spaces(module, self.graph) if all(map(targets, s.layers))]
        if not self.spaces:
            raise UserError("no channels can go", type(module).__name__, "use another recipe")
        self.images, self.zeroed = Images(x, None), dict[str, int]()

    @torch.no_grad()
    def __call__(self) -> None:
        """Zeroes the weights that write the units of the smallest norms."""
        scores = unit_scores(self.module, self.graph, self.spaces, self.wanted.importance, self.images, 0)
        gone = []
        for space, score in zip(self.spaces, scores, strict=True):
            kept = space.kept(1 - self.wanted.ratio, self.wanted.multiple)
            gone.append(space.units[score.argsort(stable=True)[: len(space.units) - kept]])
        lost = torch.cat(gone)
        for use in self.graph.uses:
            if use.role == "writes" and use.name.endswith(".weight"):
                rows = torch.isin(use.labels, lost).nonzero().flatten()
                self.module.get_parameter(use.name).data.index_fill_(use.axis, rows, 0.0)
        self.zeroed = {s.name: len(units) * s.width for s, units in zip(self.spaces, gone, strict=True)}
