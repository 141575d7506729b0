"""Where a saving is real: on disk, in memory, in time; on a CPU, on which GPUs, in which server. One row per format.

What servers run was read from vLLM's documentation and sources (0.9 to 0.32). What a CPU gains was measured on a model
of 1.1 billion parameters (scripts/results/runtime.json), and `bench` says what a folder gains where it is run. Nothing
here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmcompress.core.sparsity import Sparsity
from llmcompress.export.quantized import Scheme
from llmcompress.runtime.choose import why_not_int4, why_not_int8

#: titles of the columns
COLUMNS = ("saving", "on disk", "in memory", "in time: CPU", "in time: GPU", "server")
#: a width that every kernel takes
_WIDTH = 4096
_TRANSFORMERS = "not in transformers, which widens them"


@dataclass(frozen=True)
class Saving:
    """One saving and where it is real, in a few words each; "no" where it is not."""

    what: str
    disk: str
    memory: str
    cpu: str
    gpu: str
    server: str

    @property
    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        return [self.what, self.disk, self.memory, self.cpu, self.gpu, self.server]


_REMOVED = Saving("heads and channels removed", "yes", "yes", "yes, with any kernel", "yes, any", "any")
_ZEROS = Saving("zeros", "only with `pack`", "no", "no", "no", "any, as dense weights")
_TWO_OF_FOUR = Saving(
    "zeros, 2:4", "only with `pack`", "no", "no",
    "Ampere or newer, by torch's semi-structured prototype only", "any, as dense weights: vLLM and SGLang dropped 2:4",
)  # fmt: skip
_INT8 = Saving(
    "integer weights and inputs", "yes", f"llmcompress.load, vLLM; {_TRANSFORMERS}",
    "llmcompress.load, vLLM", "Turing to Hopper, not Blackwell", "vLLM, SGLang",
)  # fmt: skip
_INT4 = Saving(
    "4-bit weights", "yes", f"llmcompress.load, vLLM; {_TRANSFORMERS}",
    "llmcompress.load: decode, not prefill", "Ampere or newer: decode of small batches",
    "vLLM, SGLang",
)  # fmt: skip
_FP8_INPUTS = Saving(
    "FP8 weights and inputs", "yes", f"vLLM; {_TRANSFORMERS}", "no", "Ada, Hopper, Blackwell", "vLLM, SGLang"
)
_FP8 = Saving(
    "FP8 weights", "yes", f"vLLM; {_TRANSFORMERS}", "no", "Turing or newer: decode of small batches", "vLLM",
)  # fmt: skip
_FP4 = Saving(
    "4-bit floating-point weights", "yes", f"vLLM; {_TRANSFORMERS}", "no",
    "Ampere or newer: decode of small batches", "vLLM",
)  # fmt: skip


def savings(schemes: Iterable[Scheme], sparsity: Sparsity | None, removed: bool) -> list[Saving]:
    """What a run saved, one row for each kind.

    Args:
        schemes: of the quantized matrices.
        sparsity: of the zeros; None if nothing was pruned.
        removed: whether whole heads and channels were removed.
    """
    found = [_REMOVED] if removed else []
    if sparsity is not None:
        found.append(_TWO_OF_FOUR if (sparsity.n, sparsity.m) == (2, 4) else _ZEROS)
    return found + list(dict.fromkeys(_of_scheme(scheme) for scheme in schemes))


def _of_scheme(scheme: Scheme) -> Saving:
    weights, inputs = scheme.weights, scheme.activations
    if weights.kind == "fp8":
        return _FP8 if inputs is None else _FP8_INPUTS
    if weights.kind != "int":
        return _FP4
    if not why_not_int8(scheme):
        return _INT8 if (weights.bits, inputs and inputs.bits) == (8, 8) else _narrow(scheme)
    if inputs is None and weights.bits == 4 and weights.symmetric:
        return _INT4
    return _narrow(scheme)


def _narrow(scheme: Scheme) -> Saving:
    """Grids that few kernels have."""
    inputs = "" if scheme.activations is None else f", {scheme.activations.bits}-bit inputs"
    kinds = "" if scheme.weights.symmetric else "asymmetric "
    own = "no"
    if not why_not_int8(scheme):
        own = "llmcompress.load, as 8-bit integers"
    elif not why_not_int4(scheme, _WIDTH, _WIDTH):
        own = "llmcompress.load, as 4-bit integers: decode"
    return Saving(
        f"{kinds}{scheme.weights.bits}-bit weights{inputs}", "yes", own if own == "no" else "llmcompress.load",
        own, "no kernel known", "not known to run it; transformers reads it",
    )  # fmt: skip
