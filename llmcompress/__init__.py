"""llmcompress: post-training compression of Hugging Face checkpoints, block by block, on one machine.

    from llmcompress import compress, load
    report = compress("llama", recipe="jsq", output="compressed/llama-jsq")
    model = load("compressed/llama-jsq")

Names are imported when they are first used, so that ``--help`` does not wait for torch and transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompress.api import compress
    from llmcompress.recipe import Recipe
    from llmcompress.runtime.loading import load

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "compress", "load"]

_HOMES = {
    "Recipe": "llmcompress.recipe",
    "compress": "llmcompress.api",
    "load": "llmcompress.runtime.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmcompress' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
