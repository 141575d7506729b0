"""The table of methods: one paper per file, one line per method. To add one, write the file and the line."""

from __future__ import annotations

from llmcompress.core.group import Method
from llmcompress.methods.awq import AWQ
from llmcompress.methods.clip import Clip
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.jsq import JSQ
from llmcompress.methods.llm_pruner import LLMPruner
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.obr import OBR
from llmcompress.methods.omniquant import OmniQuant
from llmcompress.methods.refit import Refit
from llmcompress.methods.rtn import RTN
from llmcompress.methods.smoothquant import SmoothQuant
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.methods.wanda import Wanda

#: name in a recipe → class
METHODS: dict[str, type[Method]] = {
    "clip": Clip,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "jsq": JSQ,
    "sparsegpt": SparseGPT,
    "refit": Refit,
    "llm_pruner": LLMPruner,
    "smoothquant": SmoothQuant,
    "awq": AWQ,
    "rtn": RTN,
    "gptq": GPTQ,
    "omniquant": OmniQuant,
    "obr": OBR,
}

#: method of a stage that names none
DEFAULT_METHOD = {"clip": "clip", "prune": "wanda", "smooth": "smoothquant", "quantize": "rtn"}
