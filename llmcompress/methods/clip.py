"""The activation editor of JSQ (Guo et al., ICML 2024): the statistics see clipped activations, so that a handful of
extreme values does not decide about all the others. The activations themselves stay as they are.

    X ← clamp(X, −q, q),  q = the quantile of |X| at 1 − c, over all entries of the group's rows

Departure: the paper anneals one c per block on validation perplexity, at some 200 compressions of the whole model.
Here each group takes the candidate with the least output error on held-back rows, after the steps that follow have
run on a sample of the rows: ‖X Wᵀ − X̂ Qᵀ‖², exact for the rows and outputs in the sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.core.group import MatrixGroup, Method, run_methods
from llmcompress.core.stats import InputStats
from llmcompress.errors import UserError

#: tokens that a trial is fitted to and that it is judged on, and outputs of each matrix that take part
FIT_TOKENS, HELD_TOKENS, TRIAL_OUTPUTS = 2048, 512, 1024
#: fits of all candidates together use at most this share of the rows
FIT_SHARE = 0.5


@dataclass(frozen=True)
class Clip(Method):
    """Chooses how much of the activations' extremes the following steps see.

    Attributes:
        candidates: clip ratios c in [0, 1): the share of entries that is clamped. 0 clamps none.
    """

    candidates: tuple[float, ...] = (0, 4e-5, 5e-5, 6e-5, 7e-5)

    stage = "clip"
    needs = frozenset({"rows"})

    def __post_init__(self) -> None:
        if not self.candidates or any(not 0 <= c < 1 for c in self.candidates):
            raise UserError(
                f"candidates {list(self.candidates)} are not clip ratios",
                "clip.candidates",
                "list one or more numbers in [0, 1), e.g. [0, 4e-5]",
            )

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
        return _gather(stats, stats.rows, needs, limits[best])

    def _choose(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...], limits: list[float]) -> int:
        """Index of the candidate whose trial has the least error on held-back rows; notes all errors."""
        held, fit = _held_and_fit(stats.rows, len(self.candidates))
        if not len(fit):
            group.warnings.append(f"{group.name}: {len(held)} rows are too few to choose a clip ratio; took the first")
            return 0
        sample = _some_outputs(group)
        originals = [m.weight if group.smoothing is None else m.weight / group.smoothing for m in sample]
        energy = sum(float((held @ w.T).square().sum()) for w in originals)
        needs = frozenset().union(*(m.needs for m in rest))
        top = float(fit.abs().max())
        errors: dict[float, float] = {}  # by the limit that clamps something; candidates that clamp alike share it
        for limit in limits:
            seen = limit if limit < top else math.inf
            if seen not in errors:
                trial = sample.trial()
                run_methods(rest, trial, _gather(stats, [fit], needs, seen))
                errors[seen] = trial.output_error(held, originals) / max(energy, torch.finfo(torch.float32).tiny)
        relative = [errors[limit if limit < top else math.inf] for limit in limits]
        group.figures["clip_errors"] = {f"{c:g}": e for c, e in zip(self.candidates, relative, strict=True)}
        return min(range(len(relative)), key=relative.__getitem__)


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


def _gather(stats: InputStats, rows: list[Tensor], needs: frozenset[str], clip: float) -> InputStats:
    """Statistics of ``rows`` clipped, smoothed as ``stats`` are."""
    gathered = InputStats(stats.width, needs, rows[0].device if rows else "cpu", clip)
    for x in rows:
        gathered.update(x)
    if stats.scale is not None:
        gathered.rescale(stats.scale)
    return gathered


def _held_and_fit(rows: list[Tensor], candidates: int) -> tuple[Tensor, Tensor]:
    """Two disjoint samples of the tokens, spread evenly over all of them, (tokens, in) float32 each.

    The golden ratio's multiples are even at every length and in step with no sequence length, so that neither
    sample collects the first tokens of the sequences, which are unlike the others.
    """
    total = sum(x.shape[0] for x in rows)
    order = (torch.arange(total, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1).argsort()
    held = min(HELD_TOKENS, -(-total // 5))
    fit = min(FIT_TOKENS, total - held, max(int(FIT_SHARE * total / candidates), 64))
    picked = [order[:held].sort().values, order[held : held + fit].sort().values]
    return tuple(_take(rows, indices) for indices in picked)  # type: ignore[return-value]


def _take(rows: list[Tensor], indices: Tensor) -> Tensor:
    """Tokens by their sorted position in ``rows`` put end to end."""
    taken, start = [], 0
    for x in rows:
        inside = indices[(indices >= start) & (indices < start + x.shape[0])] - start
        taken.append(x[inside.to(x.device)].float())
        start += x.shape[0]
    return torch.cat(taken)


def _some_outputs(group: MatrixGroup) -> MatrixGroup:
    """A trial group with at most `TRIAL_OUTPUTS` evenly spread output rows of each matrix."""
    sample = group.trial()
    for matrix in sample:
        step = -(-matrix.weight.shape[0] // TRIAL_OUTPUTS)
        matrix.weight = matrix.weight[::step]
        matrix.keep = None if matrix.keep is None else matrix.keep[::step]
        matrix.aim = None if matrix.aim is None else matrix.aim[::step]
    return sample
