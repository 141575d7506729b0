"""Small finished folders of this program."""

from __future__ import annotations

import torch

from llmcompress.export.checkpoint import CheckpointWriter

FILES = {"config.json": "{}", "llmcompress.json": "{}"}


def write(folder, shards: int = 1, value: float = 0.0, **options) -> dict[str, str]:
    """A small finished folder of ours; the hashes of its shards."""
    with CheckpointWriter(folder, **options) as writer:
        for i in range(shards):
            writer.add({f"layers.{i}.weight": torch.full((2, 3), value + i), f"layers.{i}.bias": torch.ones(2)})
        hashes = writer.hashes
        writer.finish(FILES)
    return hashes


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
