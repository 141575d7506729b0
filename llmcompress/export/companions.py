"""The files that travel with a model's weights: tokenizer, chat template, licence, and code of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmcompress.errors import UserError
from llmcompress.export.destination import RECORD

COMPANIONS = (
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model
    "vocab*",
    "merges*",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",  # a compressed model is a derivative: its licence travels with it
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the files that a checkpoint needs beside its weights and that compression does not change."""

REMOTE_CODE = ("*.py",)
"""What a model with code of its own needs too."""

NEVER_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl")
"""Endings of weight files; no pattern brings them along."""


def companions(folder: Path, patterns: Iterable[str] = COMPANIONS) -> list[Path]:
    """The files of a model folder that these patterns name, weights and this program's own record excepted.

    Raises:
        UserError: one is a link to a file elsewhere, which would be copied into a folder that may be published.
    """
    found = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    home = Path(folder).resolve()
    cache = home.parent.parent / "blobs"  # where snapshots of the Hub's cache have their files
    for path in sorted(found):
        real = path.resolve()
        if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.is_relative_to(cache)):
            raise UserError("is a link that leaves the folder", str(path), "put the file itself there")
    return sorted(path for path in found if path.suffix not in NEVER_COPIED and path.name != RECORD)
