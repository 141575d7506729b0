"""What is left of a recipe where there are no rows to calibrate on: magnitude pruning and rounding to nearest."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.core.group import Method
from llmcompress.errors import UserError
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.rtn import RTN


def without_rows(methods: tuple[Method, ...], name: str) -> tuple[Method, ...]:
    """The steps for a group that hardly any token reaches, at the same sparsity and on the same grids.

    Args:
        methods: as they are bound to the block.
        name: of the group.

    Raises:
        UserError: the inputs' range is to be fixed, and nothing is known of it.
    """
    return tuple(step for method in methods if (step := _without_rows(method, name)) is not None)


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
