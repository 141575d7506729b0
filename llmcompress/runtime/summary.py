"""What a user can ask of the kernels, and how the matrices of a loaded model are multiplied.

Apart from `llmcompress.runtime.choose`, so that a model left to transformers brings no kernel, and no compiler, into
its process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmcompress.errors import UserError

#: torch's semi-structured tensors, of dense folders on CUDA
SEMI_STRUCTURED = "2:4"
#: what a user can ask for
RUNTIMES = ("auto", "int8", "int4", SEMI_STRUCTURED, "dense")
#: of them, kernels of quantized matrices
KERNELS = ("int8", "int4")


class StaysDense(UserWarning):
    """What `load` warns with where a quantized matrix has no kernel."""


@dataclass
class RuntimeSummary:
    """How the matrices of a loaded model are multiplied.

    Attributes:
        kernels: number of Linears by kernel: ``int8``, ``int4``, ``fp8`` and ``2:4`` (CUDA only), ``dense``.
        reasons: why matrices that could have a kernel are multiplied dense, with their number.
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
        kind = "" if self.kernels[SEMI_STRUCTURED] else "quantized "
        parts += [f"{count} {kind}matrices dense: {why}" for why, count in self.reasons.items()]
        return "; ".join(parts) or "no quantized matrices, all dense"


def require_kernel(summary: RuntimeSummary, runtime: str, folder: str) -> None:
    """Raises UserError if a kernel was asked for by name and no matrix can use it."""
    if runtime in (*KERNELS, SEMI_STRUCTURED) and not summary.kernels[runtime]:
        why = next(iter(summary.reasons), "it holds no quantized matrices")
        raise UserError(f"nothing in it can be multiplied in {runtime} ({why})", folder, "use runtime auto or dense")
