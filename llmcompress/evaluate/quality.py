"""What a text says about a model: perplexity, divergence from the reference, and where in the text it is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.evaluate import statistics
from llmcompress.evaluate.predictions import Predictions
from llmcompress.evaluate.texts import EvalText, Windowing

#: classes by context, up to this many tokens each; the last one takes the rest
_CONTEXTS = (16, 64, 256, 1024, 4096)
#: classes by a token's share of the text's predicted tokens
_SHARES = (1e-2, 1e-3, 1e-4)
#: documents are the unit of resampling from this many on; below, windows are
_DOCUMENT_UNITS = 20


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; ``low`` and ``high`` are None where there are fewer than two units."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Perplexity:
    """exp(total log loss / count), over tokens, words and bytes, and the loss in bits per byte.

    Words and bytes are those of the whole text; where some of its tokens are not predicted, these figures are None.
    """

    token: Estimate
    word: Estimate | None
    byte: Estimate | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Beside:
    """The model beside its reference on the same tokens.

    Attributes:
        reference: the reference's own perplexity.
        ratio: perplexity of the model / of the reference, resampled in pairs.
        p: of the paired permutation test over units that the losses are the same.
        verdict: ``worse``, ``better`` or ``within noise``.
        kl: mean KL(reference ‖ model), nats per token.
        top1: share of tokens where both find the same token most likely.
        top5: mean share of the five most likely tokens that both have.
    """

    reference: Perplexity
    ratio: Estimate
    p: float
    verdict: str
    kl: Estimate
    top1: Estimate
    top5: Estimate


@dataclass(frozen=True)
class Part:
    """Some of the tokens: by context or by frequency. Reference and KL are None without a reference."""

    name: str
    tokens: int
    perplexity: float
    reference_perplexity: float | None
    kl: float | None


@dataclass(frozen=True)
class TextQuality:
    """Everything measured on one text.

    Attributes:
        text: the file; ``sha256`` is its hash.
        tokens: predicted ones.
        documents, windows, words, bytes: counts of the text.
        windowing: in words.
        unit: what the bootstrap and the test resample: ``window`` or ``document``.
        beside: None without a reference.
        by_context: by how many tokens a prediction was made from.
        by_frequency: by how often the predicted token occurs in this text.
    """

    text: str
    sha256: str
    tokens: int
    documents: int
    windows: int
    words: int
    bytes: int
    windowing: str
    unit: str
    perplexity: Perplexity
    beside: Beside | None
    by_context: list[Part]
    by_frequency: list[Part]


def text_quality(
    text: EvalText,
    windowing: Windowing,
    document_of: NDArray[np.int64],
    found: Predictions,
    seed: int,
    complete: bool = True,
) -> TextQuality:
    """The figures of one text.

    Args:
        document_of: (windows,) the document each window belongs to.
        found: scores of every predicted token.
        seed: of the bootstrap and the permutations.
        complete: whether the windows are all of the text; else nothing is said per word or byte.
    """
    documents = len(text.documents)
    unit = "document" if documents >= _DOCUMENT_UNITS else "window"
    unit_of = document_of[found.window] if unit == "document" else found.window
    whole = complete and windowing.kind == "rolling" and windowing.prefix is not None
    tables = _Tables(unit_of, np.random.default_rng(seed))
    counts = (text.words, text.bytes) if whole else None
    return TextQuality(
        text=text.path,
        sha256=text.sha256,
        tokens=len(found.token),
        documents=documents,
        windows=len(document_of),
        words=text.words,
        bytes=text.bytes,
        windowing=windowing.describe(),
        unit=unit,
        perplexity=tables.perplexity(found.loss, counts),
        beside=_beside(tables, found, counts),
        by_context=_parts(found, found.context, _context_classes(windowing.length)),
        by_frequency=_parts(found, _shares(found.token), _share_classes()),
    )


class _Tables:
    """Sums of scores by unit, all resampled with the same draws, so that figures of one draw belong together."""

    def __init__(self, unit_of: NDArray[np.int64], generator: np.random.Generator) -> None:
        self._unit_of = np.unique(unit_of, return_inverse=True)[1]
        self._units = int(self._unit_of.max()) + 1
        self._generator, self._seed = generator, int(generator.integers(2**63))
        self._counts = self.sums(np.ones(len(unit_of)))

    def sums(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.bincount(self._unit_of, scores, minlength=self._units).astype(np.float64)
        return sums

    def mean(self, scores: NDArray[np.float64], transform: Callable[[float], float] = lambda mean: mean) -> Estimate:
        """``transform`` of the mean over tokens; it must grow with the mean."""
        sums = self.sums(scores)
        limits = None
        if self._units > 1 and np.isfinite(sums).all():
            pairs = np.stack([sums, self._counts], axis=1)
            draws = statistics.resampled_sums(pairs, np.random.default_rng(self._seed))
            limits = statistics.interval(draws[:, 0] / draws[:, 1])
        low, high = (None, None) if limits is None else (transform(limits[0]), transform(limits[1]))
        return Estimate(transform(float(sums.sum() / self._counts.sum())), low, high)

    def perplexity(self, loss: NDArray[np.float64], counts: tuple[int, int] | None) -> Perplexity:
        tokens = len(loss)

        def per(count: int) -> Estimate:
            return self.mean(loss, lambda mean: exp(mean * tokens / count))

        if counts is None:
            return Perplexity(per(tokens), None, None, None)
        bits = float(loss.sum()) / counts[1] / math.log(2)
        return Perplexity(per(tokens), per(counts[0]), per(counts[1]), bits)

    def p_value(self, difference: NDArray[np.float64]) -> float:
        return statistics.paired_permutation(self.sums(difference), self._generator)


def _beside(tables: _Tables, found: Predictions, counts: tuple[int, int] | None) -> Beside | None:
    if found.reference_loss is None or found.kl is None or found.top1 is None or found.top5 is None:
        return None
    difference = found.loss - found.reference_loss
    ratio, p = tables.mean(difference, exp), tables.p_value(difference)
    return Beside(
        reference=tables.perplexity(found.reference_loss, counts),
        ratio=ratio,
        p=p,
        verdict=statistics.verdict(p, ratio.value > 1),
        kl=tables.mean(found.kl),
        top1=tables.mean(found.top1),
        top5=tables.mean(found.top5),
    )


def _context_classes(length: int) -> list[tuple[str, float, float]]:
    edges = [1, *(c for c in _CONTEXTS if c < length), length + 1]
    return [(f"{a} to {b - 1} tokens of context", a, b) for a, b in pairwise(edges)]


def _share_classes() -> list[tuple[str, float, float]]:
    named = [f"{share:.2%}".rstrip("0%").rstrip(".") + " %" for share in _SHARES]
    edges = [math.inf, *_SHARES, 0.0]
    names = [f"{named[0]} of the text or more", *(f"{b} to {a}" for a, b in pairwise(named))]
    names.append(f"less than {named[-1]}")
    return [(name, low, high) for name, low, high in zip(names, edges[1:], edges, strict=False)]


def _shares(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much of the text each predicted token's kind makes up."""
    counts = np.bincount(tokens)
    return counts[tokens] / len(tokens)


def _parts(found: Predictions, values: NDArray[Any], classes: list[tuple[str, float, float]]) -> list[Part]:
    """Figures of the tokens with low ≤ value < high, for every class that has any."""
    parts = []
    for name, low, high in classes:
        chosen = (values >= low) & (values < high)
        if not chosen.any():
            continue
        before = None if found.reference_loss is None else exp(float(found.reference_loss[chosen].mean()))
        kl = None if found.kl is None else float(found.kl[chosen].mean())
        parts.append(Part(name, int(chosen.sum()), exp(float(found.loss[chosen].mean())), before, kl))
    return parts


def exp(mean_loss: float) -> float:
    """exp without an overflow error: a broken model's perplexity is infinite."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf if mean_loss == mean_loss else math.nan
