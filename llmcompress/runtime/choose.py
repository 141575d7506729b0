"""Which kernel multiplies a quantized matrix, or why none does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmcompress.errors import UserError
from llmcompress.export.quantized import Scheme
from llmcompress.runtime.int4 import why_not_int4
from llmcompress.runtime.int8 import why_not_int8

#: what a user can ask for
RUNTIMES = ("auto", "int8", "int4", "dense")
_KERNELS = ("int8", "int4")


@dataclass
class RuntimeSummary:
    """How the matrices of a loaded model are multiplied.

    Attributes:
        kernels: number of Linears by kernel: ``int8``, ``int4``, ``fp8`` (CUDA only), ``dense``.
        reasons: why quantized matrices are multiplied dense, with their number.
        whole: why the whole model was left to transformers; empty if it was not, or was asked for.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    whole: str = ""

    def text(self) -> str:
        """One line: ``154 matrices in int8; 2 dense: its weights are asymmetric``."""
        if self.whole:
            return f"all dense: {self.whole}"
        parts = [f"{count} matrices in {kernel}" for kernel, count in self.kernels.items() if kernel != "dense"]
        parts += [f"{count} quantized matrices dense: {why}" for why, count in self.reasons.items()]
        return "; ".join(parts) or "no quantized matrices, all dense"


def choose(scheme: Scheme, rows: int, columns: int, runtime: str, device: str = "cpu") -> tuple[str, str]:
    """The kernel for one Linear, and why it is ``dense`` if it is.

    Args:
        scheme: of the Linear.
        rows, columns: of its weight.
        runtime: ``auto`` takes whichever kernel there is; ``int8`` and ``int4`` only that one; ``dense`` none.
        device: where it will run.
    """
    if runtime == "dense":
        return "dense", "asked for"
    reasons = {"int8": why_not_int8(scheme), "int4": why_not_int4(scheme, rows, columns)}
    if device != "cpu":
        if runtime == "auto" and _is_float8(scheme) and rows % 16 == columns % 16 == 0:
            return "fp8", ""
        reasons["int4"] = "the int4 kernel is for CPUs"
        if reasons["int8"] == "" and (rows % 8 or columns % 8):
            reasons["int8"] = "the CUDA int8 kernel wants multiples of 8"
    for kernel in _KERNELS if runtime == "auto" else (runtime,):
        if not reasons[kernel]:
            return kernel, ""
    if runtime != "auto":
        return "dense", reasons[runtime]
    return "dense", reasons["int4" if scheme.activations is None else "int8"]


def _is_float8(scheme: Scheme) -> bool:
    return scheme.activations is not None and scheme.activations.kind == scheme.weights.kind == "fp8"


def require_kernel(summary: RuntimeSummary, runtime: str, folder: str) -> None:
    """Raises UserError if a kernel was asked for by name and no matrix can use it."""
    if runtime in _KERNELS and not summary.kernels[runtime]:
        why = next(iter(summary.reasons), "it holds no quantized matrices")
        raise UserError(f"nothing in it can be multiplied in {runtime} ({why})", folder, "use runtime auto or dense")
