"""Texts to evaluate on, read whole: a plain file is one document, a ``.jsonl`` file one per line, from its ``text``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.documents import jsonl_records
from llmcompress.errors import UserError
from llmcompress.evaluate.windows import Window, rolling_windows, row_windows


@dataclass(frozen=True)
class EvalText:
    """A file's documents.

    Attributes:
        path: as it was given.
        sha256: of the file.
        documents: none of them blank.
    """

    path: str
    sha256: str
    documents: tuple[str, ...]

    @staticmethod
    def read(path: str | Path) -> EvalText:
        """Reads a file.

        Raises:
            UserError: missing, not UTF-8, no text in it, or a line of JSONL without a ``text``.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError("no such file", str(path), "give --text a UTF-8 text or a .jsonl file")
        if file.suffix == ".jsonl":
            documents = [_text_of(record.fields, record.where) for record in jsonl_records(file)]
        else:
            try:
                documents = [file.read_text(encoding="utf-8-sig")]
            except UnicodeDecodeError as error:
                raise UserError(f"is not UTF-8 text ({error.reason})", str(path), "save it as UTF-8") from None
        documents = [document for document in documents if document.strip()]
        if not documents:
            raise UserError("is empty", str(path), "give a text")
        return EvalText(str(path), file_hash(file), tuple(documents))

    @property
    def words(self) -> int:
        """Pieces between runs of white space, counted as lm-eval does."""
        return sum(len(re.split(r"\s+", document)) for document in self.documents)

    @property
    def bytes(self) -> int:
        """Of the documents in UTF-8."""
        return sum(len(document.encode()) for document in self.documents)


@dataclass(frozen=True)
class Windowing:
    """How texts are cut into windows (`llmcompress.evaluate.windows`).

    Attributes:
        kind: ``rolling`` or ``rows``.
        length: tokens a prediction is made from at most; tokens per row.
        stride: tokens predicted per window after the first; always ``length`` for rows.
        prefix: token before each document; None for rows and where the tokenizer has neither begin nor end.
        prefix_text: that token as text, for reading.
    """

    kind: str
    length: int
    stride: int
    prefix: int | None
    prefix_text: str | None

    def windows_of(self, tokens: list[int]) -> list[Window]:
        """The windows of one document."""
        if self.kind == "rows":
            return row_windows(tokens, self.length)
        return rolling_windows(tokens, self.prefix, self.length, self.stride)

    def describe(self) -> str:
        """One line for the terminal."""
        if self.kind == "rows":
            return f"rows of {self.length} tokens, the first of each not predicted, no prefix"
        before = f"prefix {self.prefix_text}" if self.prefix is not None else "no prefix, first token not predicted"
        return f"rolling window of {self.length} tokens, stride {self.stride}, {before}"


def document_ids(document: str, tokenizer: Any) -> list[int]:
    """Token ids as lm-eval makes them: with what the tokenizer adds by itself, unless the text begins with it."""
    prefix = prefix_token(tokenizer)
    begins = prefix is not None and document.startswith(str(tokenizer.decode(prefix)))
    return list(tokenizer.encode(document, **({"add_special_tokens": False} if begins else {}), verbose=False))


def prefix_token(tokenizer: Any) -> int | None:
    """What stands before a document: the begin-of-sequence token, or the end-of-sequence token, or nothing."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def file_hash(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def folder_hashes(folder: Path, suffixes: Iterable[str] = (".safetensors", ".json")) -> dict[str, str]:
    """SHA-256 of a model's files by name."""
    return {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.is_file() and f.suffix in suffixes}


def _text_of(fields: dict[str, Any], where: str) -> str:
    text = fields.get("text")
    if not isinstance(text, str):
        raise UserError("has no text", where, f'write {{"text": "…"}}; it has {", ".join(fields) or "nothing"}')
    return text
