"""A recipe where rows are scarce, as they are for most experts of a mixture.

With none, magnitude pruning and rounding to nearest are left. With few, steps that compensate errors fit them to the
rows and not to the inputs: on fewer rows than their width they are hardly better than no compensation, or worse. So
their damping grows as rows become fewer, max(damping, 0.3 · width / rows). Measured on matrices of a trained model,
error of the outputs on held-back rows, half of the weights pruned:

| width | rows | magnitude | SparseGPT, damping 0.01 | damping 0.1 | with this damping |
|---:|---:|---:|---:|---:|---:|
| 256 | 32 | 0.035 | 0.057 | 0.034 | 0.026 |
| 256 | 256 | 0.035 | 0.032 | 0.022 | 0.021 |
| 768 | 256 | 0.041 | 0.060 | 0.041 | 0.033 |
| 768 | 1024 | 0.041 | 0.039 | 0.030 | 0.028 |"""

from __future__ import annotations

from dataclasses import replace

from llmcompress.core.group import Method
from llmcompress.errors import UserError
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.rtn import RTN

#: damping times rows per input column
RIDGE = 0.3


def without_rows(methods: tuple[Method, ...], name: str) -> tuple[Method, ...]:
    """The steps for a group that hardly any token reaches, at the same sparsity and on the same grids.

    Args:
        methods: as they are bound to the block.
        name: of the group.

    Raises:
        UserError: the inputs' range is to be fixed, and nothing is known of it.
    """
    return tuple(step for method in methods if (step := _without_rows(method, name)) is not None)


def steadied(methods: tuple[Method, ...], width: int, rows: int) -> tuple[Method, ...]:
    """The steps with as much damping as a matrix with ``width`` inputs needs on so many rows."""
    least = RIDGE * width / max(rows, 1)
    return tuple(
        replace(m, damping=least) if getattr(m, "damping", least) < least else m  # type: ignore[type-var]
        for m in methods
    )


def aimed_at_compressed(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """The steps where the dense model's rows for the same tokens are not known."""
    return tuple(replace(m, target="compressed") if getattr(m, "target", "") == "dense" else m for m in methods)  # type: ignore[type-var]


def _without_rows(method: Method, name: str) -> Method | None:
    sparsity, weights = getattr(method, "sparsity", None), getattr(method, "weights", None)
    if method.stage == "prune" and sparsity is not None:
        return Magnitude(sparsity)
    if method.stage != "quantize":
        return None
    if weights is None:
        return method  # it only keeps values
    activations = getattr(method, "activations", None)
    if activations is not None and not activations.dynamic:
        raise UserError("too few calibration tokens reach it to fix the range of its inputs", name,
                        "give more samples, or dynamic activations such as int8")  # fmt: skip
    return RTN(weights, activations, getattr(method, "quantize_outputs", ()))
