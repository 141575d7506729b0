"""The chain of a simulated annealing: its moves and what came of them, when a worse one is accepted, and the file that
lets an interrupted search go on."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: a perplexity that is worse by 1 is accepted with exp(−1500 / T)
STEEPNESS = 1500
_FORMAT = 1


@dataclass(frozen=True)
class Move:
    """One move and what came of it.

    Attributes:
        temperature: at which it was judged.
        block: its number.
        ratio: what the block was given.
        perplexity: of the candidate, per token, on the validation rows.
        accepted: whether the search went on from the candidate.
        current, best: the perplexity after the move, and the least so far.
    """

    temperature: float
    block: int
    ratio: float
    perplexity: float
    accepted: bool
    current: float
    best: float


class Chain:
    """Where a search stands.

    Args:
        start: clip ratio per block.
        perplexity: of the start.

    Attributes:
        moves: so far.
        ratios, best_ratios: the current ones, and those of the least perplexity so far.
        current, best: their perplexities.
    """

    def __init__(self, start: list[float], perplexity: float) -> None:
        self.start, self.perplexity = start, perplexity
        self.moves: list[Move] = []
        self.ratios, self.best_ratios = list(start), list(start)
        self.current = self.best = perplexity

    def with_move(self, block: int, ratio: float) -> list[float]:
        """The current ratios, but for one block."""
        return [*self.ratios[:block], ratio, *self.ratios[block + 1 :]]

    def take(self, temperature: float, block: int, ratio: float, perplexity: float, accepted: bool) -> Move:
        """Notes a move."""
        if accepted:
            self.ratios, self.current = self.with_move(block, ratio), perplexity
            if perplexity < self.best:
                self.best, self.best_ratios = perplexity, list(self.ratios)
        self.moves.append(Move(temperature, block, ratio, perplexity, accepted, self.current, self.best))
        return self.moves[-1]

    def to_tree(self) -> dict[str, Any]:
        """What `from_tree` reads."""
        return {"start": self.start, "perplexity": self.perplexity, "moves": [asdict(move) for move in self.moves]}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Chain:
        """The chain as it was."""
        chain = Chain([float(c) for c in tree["start"]], float(tree["perplexity"]))
        for move in tree["moves"]:
            chain.take(*(move[key] for key in ("temperature", "block", "ratio", "perplexity", "accepted")))
        return chain


class ChainFile:
    """Where a chain is kept while the search runs.

    Args:
        path: of the file.
        identity: what the search hangs on; another one's file is not gone on from.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity

    def write(self, chain: Chain) -> None:
        """Whole or not at all."""
        half = self.path.with_name(f"{self.path.name}.partial")
        tree = {"format": _FORMAT, "identity": self.identity, **chain.to_tree()}
        half.write_text(json.dumps(tree), encoding="utf-8")
        os.replace(half, self.path)

    def read(self) -> Chain | None:
        """The chain that an interrupted search left; None if there is no file.

        Raises:
            ValueError: it is another search's, with what is different.
        """
        if not self.path.is_file():
            return None
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            other = [key for key, value in self.identity.items() if tree["identity"].get(key) != value]
            chain = Chain.from_tree(tree) if tree["format"] == _FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError):
            other, chain = [], None
        if chain is None or other:
            raise ValueError(", ".join(other) or "form")
        return chain


def accepts(current: float, candidate: float, temperature: float, drawn: float) -> bool:
    """Whether a search at perplexity ``current`` goes on from ``candidate``, given a number drawn from [0, 1)."""
    return candidate <= current or drawn < math.exp(-STEEPNESS * (candidate - current) / temperature)
