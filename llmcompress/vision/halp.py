"""HALP (Shen et al., 2022, arXiv:2110.10811): of the channels that fit a latency, those worth most.

    max Σ_s V_s[k_s]   subject to   c + Σ_s u_s[k_s] + Σ_(s,t) P_st[k_s, k_t] ≤ budget

k_s says how many channels a space keeps, V_s[k] the worth of its k best, and P_st the latency of the layers that read
channels of s and write channels of t. Departure: the paper takes the cost of a channel at the present width of the
layer's input and fills a knapsack in a grouped order; here the latency of both widths together is a term of an integer
linear program, which HiGHS solves to the optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch import Tensor

#: seconds that the solver may take; what it has found by then is used
LIMIT = 60.0


@dataclass
class Cost:
    """Seconds that a choice of sizes takes.

    Attributes:
        single: (sizes,) float64 of each space.
        pairs: (sizes of s, sizes of t) float64 by (s, t), s < t.
        constant: whatever is chosen.
    """

    single: list[Tensor]
    pairs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    constant: float = 0.0

    def add(self, spaces: Sequence[int], table: Tensor) -> None:
        """Adds a table whose axes are the sizes of none, one or two ascending spaces."""
        if not spaces:
            self.constant += float(table)
        elif len(spaces) == 1:
            self.single[spaces[0]] += table
        else:
            key = (spaces[0], spaces[1])
            self.pairs[key] = self.pairs[key] + table if key in self.pairs else table.clone()

    def of(self, choice: Sequence[int]) -> float:
        """Seconds of one size of each space."""
        alone = sum(float(table[k]) for table, k in zip(self.single, choice, strict=True))
        return self.constant + alone + sum(float(P[choice[s], choice[t]]) for (s, t), P in self.pairs.items())


def knapsack(worth: Sequence[Tensor], cost: Cost, budget: float) -> list[int] | None:
    """The size of each space that is worth most within a budget; None if nothing fits.

    With z_s the choice of s as a unit vector, the outer product y_st of a pair is made of real numbers ≥ 0 whose rows
    add up to z_s and columns to z_t: at a choice there are no others, so that only the z are integers.

    Args:
        worth: (sizes,) of each space.
        cost: seconds.
        budget: seconds.
    """
    starts = np.cumsum([0, *(len(w) for w in worth)])
    singles = int(starts[-1])
    total = singles + sum(P.numel() for P in cost.pairs.values())
    rows = len(worth) + sum(sum(P.shape) for P in cost.pairs.values())
    matrix, right = lil_array((rows, total)), np.zeros(rows)
    price = np.zeros(total)
    price[:singles] = torch.cat(cost.single).numpy()
    for s in range(len(worth)):
        matrix[s, starts[s] : starts[s + 1]] = 1
        right[s] = 1
    row, column = len(worth), singles
    for (s, t), P in cost.pairs.items():
        places = np.arange(column, column + P.numel()).reshape(P.shape)
        price[column : column + P.numel()] = P.flatten().numpy()
        for line, owner in [
            *((p, starts[s] + i) for i, p in enumerate(places)),
            *((p, starts[t] + j) for j, p in enumerate(places.T)),
        ]:
            matrix[row, line] = 1
            matrix[row, owner] = -1
            row += 1
        column += P.numel()
    gain = np.zeros(total)
    gain[:singles] = torch.cat(list(worth)).double().numpy()
    found = milp(
        -gain / max(float(np.abs(gain).max()), 1e-300),
        integrality=np.arange(total) < singles,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(matrix.tocsr(), right, right),
            LinearConstraint(price[None] / budget, -np.inf, 1 - cost.constant / budget),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": LIMIT},
    )
    if found.x is None:
        return None
    return [int(found.x[a:b].argmax()) for a, b in pairwise(starts)]
