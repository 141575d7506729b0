"""Which kernel multiplies a quantized matrix, or why none does."""

from __future__ import annotations

from llmcompress.export.quantized import Scheme
from llmcompress.runtime.int4 import GROUPS, kernel_group
from llmcompress.runtime.summary import KERNELS


def why_not_int8(scheme: Scheme) -> str:
    """Why a Linear of this scheme cannot be multiplied in integers; empty if it can."""
    weights, inputs = scheme.weights, scheme.activations
    if inputs is None:
        return "its inputs are not rounded to integers"
    if weights.kind != "int":
        return f"its weights are {weights.kind}, and this processor's kernels multiply integers"
    if not weights.symmetric:
        return "its weights are asymmetric"
    if isinstance(weights.group, int) or isinstance(inputs.group, int):
        return "scales that change along a row do not leave an integer product"
    return ""


def why_not_int4(scheme: Scheme, rows: int, columns: int) -> str:
    """Why a Linear (rows, columns) of this scheme cannot run as packed 4-bit codes; empty if it can."""
    if scheme.weights.kind != "int":
        return f"its weights are {scheme.weights.kind}, and this processor's kernels multiply integers"
    if scheme.weights.bits > 4:
        return f"its weights have {scheme.weights.bits} bits"
    if scheme.activations is not None:
        return "its inputs are rounded, which the int4 kernel does not do"
    if not kernel_group(scheme, columns):
        own = scheme.weights.group_size(columns)
        return f"no group of {', '.join(map(str, GROUPS))} columns divides its own of {own}"
    if rows % 16:
        return f"its {rows} rows are no multiple of 16"
    return ""


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
    for kernel in KERNELS if runtime == "auto" else (runtime,):
        if not reasons[kernel]:
            return kernel, ""
    if runtime != "auto":
        return "dense", reasons[runtime]
    return "dense", reasons["int4" if scheme.activations is None else "int8"]


def _is_float8(scheme: Scheme) -> bool:
    return scheme.activations is not None and scheme.activations.kind == scheme.weights.kind == "fp8"
