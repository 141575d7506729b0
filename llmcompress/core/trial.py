"""Trying a decision out: what the steps that follow would make of it, judged by the output error on held-back rows.

    error = Σ ‖X Wᵀ − X̂ Qᵀ‖² / Σ ‖X Wᵀ‖²,  X held back, X̂ as run time sees it, Q after the steps that follow

exact for the rows and outputs in the sample. Trials are fitted to other rows than they are judged on."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.stats import InputStats

#: tokens that trials are fitted to and that they are judged on, and outputs of each matrix that take part
FIT_TOKENS, HELD_TOKENS, TRIAL_OUTPUTS = 2048, 512, 1024
#: fits of all trials together use at most this share of the rows
FIT_SHARE = 0.5
#: standard errors by which a choice has to beat the plain one; three, as many choices are made: some for every input
NOISE = 3.0

Choice = TypeVar("Choice", bound=Hashable)


class Trials:
    """Trials of one group.

    Args:
        group: as decided so far; it is not changed.
        stats: of its rows, which must be among them.
        rest: the steps that follow; their drafts are run.
        number: of trials that will be made, which share the rows to be fitted to.
    """

    def __init__(self, group: MatrixGroup, stats: InputStats, rest: tuple[Method, ...], number: int) -> None:
        self.stats, self.rest = stats, tuple(method.draft() for method in rest)
        self.held, self.fit = held_and_fit(stats.rows, number)
        self.sample = group.trial(lambda outputs: outputs[:: stride(len(outputs))])
        back = 1.0 if group.smoothing is None else group.smoothing
        self.originals = [(m.weight if m.aim is None else m.aim) / back for m in self.sample]
        self.energy = sum(float((self.held @ w.T).square().sum()) for w in self.originals)
        self.needs = frozenset[str]().union(*(method.needs for method in self.rest))

    def error(
        self,
        decide: Callable[[Matrix], None] = lambda matrix: None,
        clip: float = math.inf,
        smoothing: Tensor | None = None,
    ) -> Tensor:
        """Output error after ``decide`` on each sampled matrix and the steps that follow, by held-back token; their
        sum is relative to the outputs' energy. (tokens,) float32.

        Args:
            decide: changes a matrix of at most `TRIAL_OUTPUTS` outputs, every ``stride(outputs)``-th of the whole.
            clip: limit to which the rows are clamped in the statistics that the steps see.
            smoothing: (in,) what the inputs are divided by first.
        """
        trial, stats = self.sample.trial(), gather(self.stats, [self.fit], self.needs, clip)
        if smoothing is not None:
            trial.smooth(smoothing, stats)
        for matrix in trial:
            decide(matrix)
        run_methods(self.rest, trial, stats)
        return trial.output_errors(self.held, self.originals) / max(self.energy, torch.finfo(torch.float32).tiny)


def clearly_least(errors: dict[Choice, Tensor], plain: Choice) -> Choice:
    """The choice of least error, where it beats the ``plain`` one by more than the noise; else the plain one.

    The noise is `NOISE` standard errors of the sum over tokens of the difference between the two, a paired test: what
    wins on a few hundred tokens by less is as likely to lose on others.

    Args:
        errors: (tokens,) of each choice, of the same tokens.
    """
    best = min(errors, key=lambda choice: float(errors[choice].sum()))
    gain = (errors[plain] - errors[best]).double()
    noise = NOISE * float(gain.std(correction=1)) * math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    return best if float(gain.sum()) > noise else plain


def stride(outputs: int) -> int:
    """Every how many-th output row of a matrix takes part in trials."""
    return -(-outputs // TRIAL_OUTPUTS)


def gather(stats: InputStats, rows: list[Tensor], needs: frozenset[str], clip: float) -> InputStats:
    """Statistics of ``rows`` (tokens, in) clipped, smoothed as ``stats`` are."""
    gathered = InputStats(stats.width, needs, rows[0].device if rows else "cpu", clip, stats.length)
    for x in rows:
        gathered.update(x)
    if stats.scale is not None:
        gathered.rescale(stats.scale)
    return gathered


def held_and_fit(rows: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Two disjoint samples of the tokens, spread evenly over all of them, (tokens, in) float32 each.

    The golden ratio's multiples are even at every length and in step with no sequence length, so that neither
    sample collects the first tokens of the sequences, which are unlike the others.
    """
    total = sum(x.shape[0] for x in rows)
    order = (torch.arange(total, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1).argsort()
    held = min(HELD_TOKENS, -(-total // 5))
    fit = min(FIT_TOKENS, total - held, max(int(FIT_SHARE * total / number), 64))
    return _take(rows, order[:held].sort().values), _take(rows, order[held : held + fit].sort().values)


def _take(rows: list[Tensor], indices: Tensor) -> Tensor:
    """Tokens by their sorted position in ``rows`` put end to end."""
    taken, start = [], 0
    for x in rows:
        inside = indices[(indices >= start) & (indices < start + x.shape[0])] - start
        taken.append(x[inside.to(x.device)].float())
        start += x.shape[0]
    return torch.cat(taken)
