"""The activation editor of JSQ (Guo et al., ICML 2024): the statistics see clipped activations, so that a handful of
extreme values does not decide about all the others. The activations themselves stay as they are.

    X ← clamp(X, −q, q),  q = the quantile of |X| at 1 − c, over all entries of the group's rows

The paper anneals one c per block on validation perplexity, at some 200 compressions of the whole model; that is
``search: annealing``, which the run does before its walk (see `llmcompress.annealing`).

Departure, and default: each group takes the candidate with the least output error on held-back rows, after the steps
that follow have run on a sample of the rows: ‖X Wᵀ − X̂ Qᵀ‖², exact for the rows and outputs in the sample; the first
candidate, unless another is better by more than the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmcompress.core.block import BlockView
from llmcompress.core.group import MatrixGroup, Method
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import Trials, clearly_least, gather
from llmcompress.errors import UserError

#: what only `annealing` reads
_OF_ANNEALING = ("moves", "temperature_start", "temperature_end", "validation")


@dataclass(frozen=True)
class Clip(Method):
    """Chooses how much of the activations' extremes the following steps see.

    Attributes:
        candidates: clip ratios c in [0, 1): the share of entries that is clamped. 0 clamps none.
        search: ``closed-form`` chooses per group by its output error; ``annealing`` chooses per block by perplexity.
        ratios: one per block, the first block's first: taken as they are. Annealing starts from them; without them,
            from the middle one of the candidates everywhere.
        moves: of annealing at each temperature; each compresses the model anew from the block it changes.
        temperature_start, temperature_end: T is divided by 2, 3, 4 … from the one, while it is not below the other.
        validation: share of the calibration rows on which annealing judges, and on which it does not calibrate.
    """

    candidates: tuple[float, ...] = (0, 4e-5, 5e-5, 6e-5, 7e-5)
    search: Literal["closed-form", "annealing"] = "closed-form"
    ratios: tuple[float, ...] = ()
    moves: int = 50
    temperature_start: float = 300.0
    temperature_end: float = 10.0
    validation: float = 0.25

    stage = "clip"
    needs = frozenset({"rows"})

    def __post_init__(self) -> None:
        for key, ratios in (("candidates", self.candidates), ("ratios", self.ratios or (0,))):
            if not ratios or any(not 0 <= c < 1 for c in ratios):
                raise UserError(
                    f"{key} {list(ratios)} are not clip ratios",
                    f"clip.{key}",
                    "list one or more numbers in [0, 1), e.g. [0, 4e-5]",
                )
        if self.search == "annealing":
            self._check_annealing()
            return
        for key in _OF_ANNEALING:
            if getattr(self, key) != getattr(Clip, key):
                raise UserError("only annealing reads it", f"clip.{key}", "add search: annealing, or leave it out")

    def _check_annealing(self) -> None:
        if len(set(self.candidates)) < 2:
            raise UserError("annealing chooses between candidates", "clip.candidates", "list at least two")
        if self.moves < 1:
            raise UserError(f"{self.moves} moves", "clip.moves", "use 1 or more")
        if not 0 < self.temperature_end <= self.temperature_start < math.inf:
            raise UserError(f"from {self.temperature_start:g} to {self.temperature_end:g}", "clip.temperature_start",
                            "temperatures are positive and fall, e.g. from 300 to 10")  # fmt: skip
        if not 0 < self.validation < 1:
            raise UserError(f"{self.validation:g} is no share of the rows", "clip.validation", "use e.g. 0.25")

    def misfit_blocks(self, shares: Sequence[float]) -> str:
        if self.ratios and len(self.ratios) != len(shares):
            return f"{len(self.ratios)} clip ratios for {len(shares)} blocks"
        return ""

    def for_block(self, view: BlockView) -> Clip:
        if self.search == "annealing":
            raise UserError("annealing comes before the walk", "clip.search", "compress with `llmcompress.compress`")
        return replace(self, candidates=(self.ratios[view.index],), ratios=()) if self.ratios else self

    def apply(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...] = ()) -> InputStats:
        needs = stats.needs.union(*(m.needs for m in rest))
        if "cross" in needs:
            raise UserError(
                "clipped statistics and the dense model's rows cannot be had together",
                group.name,
                "remove the clip stage, or aim at the compressed model's own outputs",
            )
        limits = clip_limits(stats.rows, self.candidates)
        best = 0
        if len(self.candidates) > 1 and rest and stats.rows:
            best = self._choose(group, stats, rest, limits)
        group.figures["clip_ratio"] = self.candidates[best]
        if needs <= stats.needs and limits[best] == stats.clip:
            return stats
        return gather(stats, stats.rows, needs, limits[best])

    def _choose(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...], limits: list[float]) -> int:
        """Index of the candidate whose trial has the least error on held-back rows, the first unless another is
        clearly better; notes all errors."""
        trials = Trials(group, stats, rest, len(limits))
        if not len(trials.fit):
            group.warnings.append(
                f"{group.name}: {stats.count} rows are too few to choose a clip ratio; took the first"
            )
            return 0
        top = float(trials.fit.abs().max())
        seen = [limit if limit < top else math.inf for limit in limits]  # candidates that clamp alike share a trial
        errors = {limit: trials.error(clip=limit) for limit in dict.fromkeys(seen)}
        group.figures["clip_errors"] = {
            f"{c:g}": float(errors[limit].sum()) for c, limit in zip(self.candidates, seen, strict=True)
        }
        return seen.index(clearly_least(errors, plain=seen[0]))


def clip_limits(rows: list[Tensor], ratios: tuple[float, ...]) -> list[float]:
    """The largest |x| that stays when the ⌊c·n⌋ largest of all n entries are clamped, for each ratio c.

    Args:
        rows: (tokens, in) each.

    Returns:
        One limit per ratio, itself an entry of |X|; infinity where not one entry is to be clamped.
    """
    entries = sum(x.numel() for x in rows)
    clamped = [min(math.floor(c * entries), entries - 1) if entries else 0 for c in ratios]
    wanted = max(clamped) + 1
    largest = torch.empty(0)
    for x in rows if max(clamped) else ():
        size = x.detach().abs().flatten().float()
        if len(largest) == wanted:
            size = size[size > largest[-1]]
        largest = torch.cat([largest.to(size), size.topk(min(wanted, len(size))).values])
        largest = largest.topk(min(wanted, len(largest))).values
    return [float(largest[count]) if count else math.inf for count in clamped]
