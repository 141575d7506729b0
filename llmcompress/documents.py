"""Documents to calibrate on: the lines of a JSONL file, or the rows of a data set on the Hub or in a folder.

A document is a ``text``, a conversation in ``messages``, or a ``prompt`` with or without its ``completion``; the last
two go through the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import UserError

#: far more than a document has
_LINE_BYTES = 1 << 28
_FIELDS = ("text", "messages", "prompt")


@dataclass(frozen=True)
class Record:
    """One document and where it was read, for messages: ``data.jsonl, line 3``."""

    where: str
    fields: dict[str, Any]


def jsonl_records(path: Path) -> Iterator[Record]:
    """The documents of a JSONL file; blank lines are skipped.

    Raises:
        UserError: not UTF-8, or a line that is no JSON object.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), start=1):
            where = f"{path}, line {number}"
            if len(raw) == _LINE_BYTES:
                raise UserError(f"has more than {_LINE_BYTES >> 20} MiB", where, "write one document per line")
            try:
                line = raw.decode("utf-8-sig").strip()
                content = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise UserError(f"is not UTF-8 text ({error.reason})", where, "save it as UTF-8") from None
            except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
                said = getattr(error, "msg", _first_line(error))
                raise UserError(f"is not JSON ({said})", where, "write one JSON object per line") from None
            if not line:
                continue
            if not isinstance(content, dict):
                raise UserError("is not a JSON object", where, 'write {"text": "…"} on every line')
            yield Record(where, content)


def dataset_records(source: str) -> Iterator[Record]:
    """The rows of a data set in their order, streamed: no more is fetched than is read.

    Args:
        source: ``NAME``, ``NAME:split`` or ``NAME:config:split``, NAME being a folder or an id on the Hub.

    Raises:
        UserError: not such a name, no such data set, configuration or split, or no network.
    """
    name, config, split = _parse(source)
    from datasets import load_dataset  # takes a second, and most runs need none
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(load_dataset(name, config, split=split, streaming=True)):
            yield Record(f"{source}, row {number}", row)
    except ConnectionError as error:
        raise UserError(
            f"cannot be reached ({_first_line(error)})", source,
            "connect to the network, or give a text file or a local folder",
        ) from error  # fmt: skip
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"cannot be read ({_first_line(error)})", source, "give an existing NAME[:split] or NAME:config:split"
        ) from error


def document_tokens(record: Record, tokenizer: Any) -> list[int]:
    """Token ids of one document; none if it is blank.

    Raises:
        UserError: no text in it, or a conversation that the tokenizer has no template for.
    """
    text = record.fields.get("text")
    if isinstance(text, str):
        return encoded(text, tokenizer, record.where) if text.strip() else []
    messages = _messages(record)
    if not tokenizer.chat_template:
        raise UserError(
            "is a conversation, but the tokenizer has no chat template", record.where, "give documents with a text"
        )
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and may fail as it likes
        raise UserError(
            f"does not fit the chat template ({_first_line(error)})", record.where, "give role and content per message"
        ) from error
    # the template has written the special tokens already
    return encoded(written, tokenizer, record.where, special=False)


def encoded(text: str, tokenizer: Any, where: str, special: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
        text: not blank.
        tokenizer: of transformers.
        where: the text is from, for the error.
        special: add the special tokens, unless the text has them already.

    Raises:
        UserError: the tokenizer fails on it.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # files that do not fit each other raise whatever the library runs into
        raise UserError(
            f"the tokenizer fails on it ({_first_line(error)})", where, "give the tokenizer that belongs to the model"
        ) from error
    return ids


def _messages(record: Record) -> list[dict[str, Any]]:
    """The conversation of a record."""
    fields = record.fields
    if isinstance(fields.get("messages"), list):
        return list(fields["messages"])
    messages: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        part = fields.get(key)
        if isinstance(part, str):
            messages.append({"role": role, "content": part})
        elif isinstance(part, list):
            messages += part
        elif key == "prompt":
            raise UserError(
                f"has no {', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}", record.where,
                f"rename one of its fields: {', '.join(fields) or 'none'}",
            )  # fmt: skip
    return messages


def _parse(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split. A folder's own name may hold colons."""
    if Path(source).is_dir():
        return source, None, "train"
    name, *words = source.split(":")
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(
            "neither 'self' nor a file, a folder or a data set", source,
            "use self, FILE.txt, FILE.jsonl, FILE.safetensors or NAME[:split]",
        )  # fmt: skip
    if len(words) > 2 or not all(words):
        raise UserError("too many or empty parts", source, "write NAME, NAME:split or NAME:config:split")
    return name, words[0] if len(words) == 2 else None, words[-1] if words else "train"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
