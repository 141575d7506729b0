"""Token rows to calibrate and to evaluate on: from a text, from documents, as they are, or written by the model itself.

A text is tokenised in one piece and cut into rows of T tokens without overlap, as the papers do: the first N rows are
the calibration set. Documents are tokenised one by one and joined with the end-of-sequence token. Rows that are tokens
already come from a safetensors file, so that another program can be given the very same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llmcompress.documents import Record, dataset_records, document_tokens, encoded, jsonl_records
from llmcompress.errors import UserError
from llmcompress.sampling import check_length, self_samples

__all__ = [
    "EVALUATION_TOKENS",
    "NONE",
    "ROWS",
    "SELF",
    "Calibration",
    "digest",
    "evaluation_rows",
    "self_samples",
    "token_rows",
]

#: the source that needs no data, and that of recipes which need no rows at all
SELF, NONE = "self", "none"
#: the tensor that a safetensors file of token rows holds, (N, T) int64
ROWS = "input_ids"
_SUFFIXES = (".txt", ".jsonl", ".safetensors")
#: an evaluation reads at most this many tokens, in whole rows: 119 rows of 512
EVALUATION_TOKENS = 119 * 512
#: tokens before the cut that may come out otherwise when only the beginning of a text is tokenised
_MARGIN = 64


@dataclass(frozen=True)
class Calibration:
    """Which rows to calibrate on.

    Attributes:
        source: ``self``, ``none``, ``FILE.txt``, ``FILE.jsonl``, ``FILE.safetensors`` with ``input_ids``, or a data set
            ``NAME[:split]`` or ``NAME:config:split`` that the ``datasets`` library reads, on the Hub or in a folder;
            the split is ``train`` if not given.
        samples: number of rows.
        length: tokens per row.
        seed: of the model's own samples; not negative. Texts are read from their beginning, whatever the seed.
    """

    source: str = SELF
    samples: int = 32
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"{self.samples} rows", "--samples", "use at least 1")
        if self.length < 2:
            raise UserError(f"rows of {self.length} tokens", "--length", "use at least 2: one predicts the next")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative", "--seed", "use 0 or more")


def digest(tokens: Tensor) -> str:
    """SHA-256 of (N, T) token rows: those who have the same were judged on the same."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()


def token_rows(
    calibration: Calibration, folder: str | Path, *, device: str = "cpu", trust_remote_code: bool = False
) -> Tensor:
    """The calibration rows, (samples, length) int64; of the source ``none`` no row.

    Args:
        calibration: which.
        folder: of the model, for its tokenizer; for ``self`` its weights too.
        device: where a model writes its samples.
        trust_remote_code: run code that came with the checkpoint.

    Raises:
        UserError: the source is unknown, missing, unreadable or too short, the folder has no tokenizer, the model
            has fewer positions than a row, or stored rows are not int64 rows of that length in its vocabulary.
    """
    if calibration.source == NONE:
        return torch.empty(0, calibration.length, dtype=torch.int64)
    if calibration.source == SELF:
        request = (calibration.samples, calibration.length, calibration.seed)
        return self_samples(folder, [request], device=device, trust_remote_code=trust_remote_code)[0]
    rows, length = calibration.samples, calibration.length
    ids = _read(calibration.source, Path(folder), rows * length, length, trust_remote_code)
    if len(ids) < rows * length:
        fits = len(ids) // length
        raise UserError(
            f"{len(ids)} tokens, but {rows} rows of {length} need {rows * length}", calibration.source,
            f"give a longer text or --samples {fits}" if fits else "give a longer text or a smaller --length",
        )  # fmt: skip
    return torch.tensor(ids[: rows * length]).view(rows, length)


def evaluation_rows(
    source: str | Path,
    folder: str | Path,
    length: int,
    *,
    max_tokens: int = EVALUATION_TOKENS,
    trust_remote_code: bool = False,
) -> Tensor:
    """Rows to evaluate on, (rows, length) int64: as many whole ones as the text has up to ``max_tokens``, at least one.

    Raises:
        UserError: as `token_rows`; too short is a text of less than one row.
    """
    rows = max(1, max_tokens // length)
    ids = _read(str(source), Path(folder), rows * length, length, trust_remote_code)
    if len(ids) < length:
        raise UserError(
            f"{len(ids)} tokens, but one row of {length} needs {length}", str(source),
            "give a longer text or a smaller --length",
        )  # fmt: skip
    rows = min(rows, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _read(source: str, folder: Path, needed: int, length: int, trust_remote_code: bool) -> list[int]:
    """Token ids of a source: ``needed`` or more if it has as many, else all of them."""
    path = Path(source)
    if path.suffix in _SUFFIXES and not path.is_file():
        raise UserError("no such file", source, "check the path")
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UserError(f"unknown kind of file '{path.suffix}'", source, "give a .txt, .jsonl or .safetensors file")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_length(config, length)
    vocabulary = config.get_text_config().vocab_size
    if path.suffix == ".safetensors":
        return _stored_tokens(path, length, vocabulary)[:needed]
    tokenizer = _tokenizer(folder, trust_remote_code)
    if path.suffix == ".txt":
        ids = _text_tokens(path, tokenizer, needed)
    else:
        ids = _joined(jsonl_records(path) if path.is_file() else dataset_records(source), tokenizer, needed, source)
    if ids and max(ids) >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {max(ids)}, the model knows {vocabulary}", str(folder),
            "give the tokenizer that belongs to the model",
        )  # fmt: skip
    return ids


def _stored_tokens(path: Path, length: int, vocabulary: int) -> list[int]:
    """Token ids of the rows in a safetensors file, one row after the other."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            rows = file.get_tensor(ROWS) if ROWS in names else None
    except SafetensorError as error:
        raise UserError(f"is not a safetensors file ({error})", str(path), "write it again") from None
    if rows is None:
        raise UserError(
            f"holds no tensor {ROWS}, but {', '.join(sorted(names)) or 'nothing'}", str(path),
            f"store the rows as {ROWS}, (rows, tokens) int64",
        )  # fmt: skip
    if rows.dtype != torch.int64 or rows.ndim != 2:
        kind = str(rows.dtype).removeprefix("torch.")
        raise UserError(
            f"{ROWS} is {kind} of shape {tuple(rows.shape)}", str(path), "store int64 of shape (rows, tokens)"
        )
    if rows.shape[1] != length:
        raise UserError(
            f"its rows have {rows.shape[1]} tokens, not {length}", str(path), f"use --length {rows.shape[1]}"
        )
    outside = rows[(rows < 0) | (rows >= vocabulary)]
    if len(outside):
        raise UserError(
            f"token {int(outside[0])}, but the model knows 0 to {vocabulary - 1}", str(path),
            "give rows that the model's own tokenizer made",
        )  # fmt: skip
    ids: list[int] = rows.flatten().tolist()
    return ids


def _text_tokens(path: Path, tokenizer: Any, needed: int) -> list[int]:
    """Tokens of a text in one piece; of a long one no more of its beginning is read than ``needed`` tokens take."""
    characters = 8 * (needed + _MARGIN)
    while True:
        try:
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(characters)
        except UnicodeDecodeError as error:
            raise UserError(f"is not UTF-8 text ({error.reason})", str(path), "save it as UTF-8") from None
        if not text.strip():
            raise UserError(f"is empty: 0 tokens, and {needed} are needed", str(path), "give a text")
        ids = encoded(text, tokenizer, str(path))
        if len(text) < characters or len(ids) >= needed + _MARGIN:
            return ids
        characters *= 4


def _joined(records: Iterator[Record], tokenizer: Any, needed: int, source: str) -> list[int]:
    """Tokens of documents, each closed by the end-of-sequence token if the tokenizer has one."""
    ids: list[int] = []
    for record in records:
        document = document_tokens(record, tokenizer)
        end = tokenizer.eos_token_id
        if document and end is not None and document[-1] != end:
            document.append(end)
        ids += document
        if len(ids) >= needed:
            break
    if not ids:
        raise UserError(f"is empty: 0 tokens, and {needed} are needed", source, "give documents with text")
    return ids


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the libraries check little: files that do not fit raise whatever they run into
        raise UserError(
            f"its tokenizer cannot be read ({' '.join(str(error).split())[:120] or type(error).__name__})", str(folder),
            "copy the tokenizer files beside the weights, or calibrate on 'self'",
        ) from error  # fmt: skip
