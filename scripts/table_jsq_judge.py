"""What the table of JSQ measures on a finished folder: quality on every text, size, multiply-accumulates.

The dense model runs once. Its logits lie in a file, in float32, and every compressed model is compared with them, so
that a cell costs one forward of the compressed model. Figures are those of `llmcompress.evaluate`.

Perplexity per word: exp(nll / words). A row of T tokens predicts its tokens 2 … T; nll is the sum over those, and the
words are those runs of non-space characters of the text that begin in one of them. So both cover the same text, and the
first token of a row counts in neither. Texts that are not plain (``.jsonl``, stored rows) have none.

Multiply-accumulates per token: one for each weight of the blocks' matrices; embeddings, head and the products of
attention stay out. In a mixture of experts every expert counts."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmcompress.calibration import evaluation_rows
from llmcompress.errors import UserError
from llmcompress.evaluate.divergence import Comparison, Divergence
from llmcompress.evaluate.stream import rounded_activations
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel, micro_batches
from llmcompress.report import MatrixReport
from llmcompress.source import Source
from llmcompress.suspend import gates


@dataclass(frozen=True)
class EvalText:
    """What is read of one text.

    Attributes:
        name: of the file, without its ending.
        tokens: (rows, T) int64.
        words: that begin in predicted tokens; None if the file is no plain text.
    """

    name: str
    tokens: Tensor
    words: int | None

    @staticmethod
    def read(file: str, folder: Path, length: int, rows: int | None) -> EvalText:
        """The first ``rows`` rows of a text, all up to 119 · 512 tokens if None."""
        limit = {} if rows is None else {"max_tokens": rows * length}
        tokens = evaluation_rows(file, folder, length, **limit)
        return EvalText(Path(file).stem, tokens, _words(Path(file), folder, tokens))

    @property
    def fingerprint(self) -> str:
        """Of the tokens."""
        return fingerprint(self.tokens)


class Judge:
    """Compares folders with one dense model.

    Args:
        source: the dense model.
        texts: to compare on; all have rows of the same length.
        folder: where the dense model's logits lie while this lives.

    Attributes:
        dense: the dense model's figures by text, its size and its multiply-accumulates.

    Raises:
        UserError: the logits do not fit on the disk.
    """

    def __init__(self, source: Source, texts: list[EvalText], folder: Path) -> None:
        self.source, self.texts = source, texts
        self._batches = [(t, batch) for t, text in enumerate(texts) for batch in text.tokens.split(self._rows(text))]
        model = source.open()
        self._dense = self._store(model, folder / "dense-logits.bin")
        compared = self._compare(self._dense)
        self.dense = {
            "size_bytes": source.checkpoint.size_bytes,
            **multiply_accumulates([MatrixReport(n, tuple(p.shape), 0.0, 0.0) for n, p in _matrices(model)]),
            "texts": {x.name: _figures(x, compared[x.name], compared[x.name].perplexity_before) for x in texts},
        }

    def figures(self, output: Path) -> dict[str, dict[str, float | None]]:
        """Quality of a compressed folder, by text."""
        compared = self._compare(logits(self.source.open(Checkpoint(output)), [batch for _, batch in self._batches]))
        return {x.name: _figures(x, compared[x.name], compared[x.name].perplexity_after) for x in self.texts}

    def _compare(self, results: Iterator[Tensor] | list[Tensor]) -> dict[str, Divergence]:
        found = [Comparison() for _ in self.texts]
        for (t, tokens), dense, compressed in zip(self._batches, self._dense, results, strict=True):
            found[t].update(dense.to(compressed.device), compressed, tokens.to(compressed.device))
        return {text.name: comparison.result() for text, comparison in zip(self.texts, found, strict=True)}

    def _store(self, model: BlockwiseModel, file: Path) -> list[Tensor]:
        """The dense model's logits of every batch, (B, T, V) each, as parts of one mapped file."""
        vocabulary = model.model.get_output_embeddings().weight.shape[0]
        sizes = [batch.numel() * vocabulary for _, batch in self._batches]
        needed, free = 4 * sum(sizes), shutil.disk_usage(file.parent).free
        if needed > free:
            raise UserError(
                f"the dense model's logits take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
                str(file.parent), "use fewer --eval-rows, or another --out",
            )  # fmt: skip
        parts = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=torch.float32).split(sizes)
        stored = []
        for part, found in zip(parts, logits(model, [batch for _, batch in self._batches]), strict=True):
            part.copy_(found.flatten())
            stored.append(part.view(found.shape))
        return stored

    @staticmethod
    def _rows(text: EvalText) -> int:
        return len(micro_batches(text.tokens, limit=4096)[0])


@torch.no_grad()
def logits(model: BlockwiseModel, batches: list[Tensor]) -> Iterator[Tensor]:
    """Logits (B, T, V) of every (B, T) batch in turn; blocks are read from disk one by one.

    Inputs of quantized matrices are rounded as a run time would round them.
    """
    last = len(model.blocks) - 1
    with gates([block.module for block in model.blocks]), rounded_activations(model):
        forwards = model.start_forwards(batches, head=True)
        for index in range(last):
            model.load_block(index)
            for forward in forwards:
                forward.resume()
            model.release_block(index)
        model.load_block(last)
        for forward in forwards:
            forward.resume()
            yield forward.result
            forward.result = None
        model.release_block(last)


def words_begun(text: str, offsets: list[tuple[int, int]], scored: list[bool]) -> int:
    """How many words of a text begin in a scored token; a word is a run of characters that are not white space.

    Args:
        text: tokenised in one piece.
        offsets: of each token, from and to which character.
        scored: whether a token counts.
    """
    count, token = 0, 0
    for place, character in enumerate(text):
        if character.isspace() or (place and not text[place - 1].isspace()):
            continue
        while token < len(offsets) and offsets[token][1] <= place:
            token += 1
        if token == len(offsets):
            break
        count += scored[token]
    return count


def per_word(perplexity: float, tokens: int, words: int | None) -> float | None:
    """exp(nll / words), where nll is that of ``tokens`` predictions with this perplexity per token."""
    if not words:
        return None
    exponent = math.log(perplexity) * tokens / words if math.isfinite(perplexity) else math.inf
    return math.exp(exponent) if exponent < 700 else math.inf


def multiply_accumulates(matrices: list[MatrixReport]) -> dict[str, int]:
    """Per token: ``macs`` of all weights, ``nonzero_macs`` of those that are not zero."""
    total = sum(m.weights for m in matrices)
    return {"macs": total, "nonzero_macs": total - sum(m.zeros for m in matrices)}


def fingerprint(content: Tensor | Path) -> str:
    """First 12 hex digits of the SHA-256 of a tensor or a file."""
    digest = hashlib.sha256()
    if isinstance(content, Path):
        with content.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    else:
        digest.update(str(tuple(content.shape)).encode())
        digest.update(content.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _words(file: Path, folder: Path, tokens: Tensor) -> int | None:
    if file.suffix != ".txt":
        return None
    text = file.read_text(encoding="utf-8-sig")
    coded = AutoTokenizer.from_pretrained(folder)(text, return_offsets_mapping=True, verbose=False)
    if coded["input_ids"][: tokens.numel()] != tokens.flatten().tolist():
        raise UserError("its tokens in one piece differ from those of its rows", str(file), "give it as .jsonl")
    scored = [place % tokens.shape[1] > 0 for place in range(tokens.numel())]
    return words_begun(text, coded["offset_mapping"][: len(scored)], scored)


def _figures(text: EvalText, found: Divergence, perplexity: float) -> dict[str, float | None]:
    return {
        "perplexity": perplexity,
        "word_perplexity": per_word(perplexity, found.tokens, text.words),
        "kl": found.kl_divergence,
        "kl_stderr": found.kl_stderr,
        "top1": found.top1_agreement,
        "tokens": found.tokens,
        "words": text.words,
    }


def _matrices(model: BlockwiseModel) -> Iterator[tuple[str, Tensor]]:
    """The blocks' matrices, by name."""
    for block in model.blocks:
        for name, parameter in block.module.named_parameters():
            if parameter.dim() >= 2:
                yield f"{block.name}.{name}", parameter
