"""Convolutional networks through the same core: what a convolution needs beyond `core` and `methods`, and no more."""

from __future__ import annotations

from llmcompress.vision.recipe import VisionRecipe
from llmcompress.vision.run import VisionRun
from llmcompress.vision.steps import Compressed, VisionOptions, compress_vision
from llmcompress.vision.storage import load_vision

__all__ = ["Compressed", "VisionOptions", "VisionRecipe", "VisionRun", "compress_vision", "load_vision"]
