"""A compressed network for other programs: ``network.pt2`` for `torch.export.load`, ``network.onnx`` for onnxruntime.

Both hold the codes, and say with operations of their own what they mean:

| rounded       | ``network.pt2``                       | ``network.onnx``                                           |
|---------------|---------------------------------------|------------------------------------------------------------|
| weights, int  | int8 codes, their values by arithmetic | DequantizeLinear of INT8, of INT4 up to 4 bits            |
| weights, fp8  | the bits of e4m3, the same            | DequantizeLinear of FLOAT8E4M3FN                           |
| other weights | codes, the same                       | FLOAT: the values they stand for                           |
| static inputs, int | divide, round, clamp, multiply   | QuantizeLinear, DequantizeLinear: runtimes multiply int8   |
| other inputs  | the operations that round them        | the same                                                   |

onnxruntime multiplies integers where the next layer rounds the output of a convolution at once; what is added to
something first, as at the end of a residual block, it multiplies in float32.

A code that lies between two values may fall to the other side where operations come in another order, so that what
rounds its inputs is equal up to `ROUNDED`, all else up to `EXACT`. Both take any number of images."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import UserError, nearest
from llmcompress.vision.coded import OPSET, stored_type, with_codes
from llmcompress.vision.layers import RoundedConv2d, RoundedLinear
from llmcompress.vision.network import logits

#: what ``--export`` takes → the file it writes
FILES = {"program": "network.pt2", "onnx": "network.onnx"}
#: relative difference of the logits: of networks that round no inputs, and of those that do
EXACT, ROUNDED = 1e-4, 2e-2
#: packages without which there is no ONNX file
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_exports(wanted: tuple[str, ...], module: nn.Module, x: Tensor) -> None:
    """Whether a network can be exported here, before anything is done to it.

    Args:
        wanted: keys of FILES.
        module: dense.
        x: (N, C, H, W), at least two images.

    Raises:
        UserError: an unknown kind, a missing package, or a network that cannot be traced.
    """
    for kind in wanted:
        if kind not in FILES:
            raise UserError(f"unknown '{kind}'", "--export", nearest(kind, FILES))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "onnx" in wanted and missing:
        raise UserError(
            f"{', '.join(missing)} not installed", "--export onnx", "pip install 'llmcompress[onnx]', or leave it out"
        )
    if wanted:
        traced(module, x)


def traced(module: nn.Module, x: Tensor) -> Any:
    """The ``torch.export.ExportedProgram`` from images (N, C, H, W), of any N, to logits.

    Raises:
        UserError: it cannot be traced.
    """
    try:
        with _quiet():
            batch = torch.export.Dim("batch")
            found = torch.export.export(_Classifier(module).eval(), (x,), dynamic_shapes=({0: batch},))
    except Exception as error:  # an exporter may fail in any way
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"torch.export cannot trace it: {said}", "--export", "leave it out") from None
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of files on this machine
    return found


def export(kind: str, module: nn.Module, x: Tensor, folder: Path) -> dict[str, Any]:
    """Writes one file, and runs it; a file whose outputs are not the network's is removed.

    Args:
        kind: key of FILES.
        module: compressed.
        x: (N, C, H, W), at least two images, on which it is compared.
        folder: exists.

    Returns:
        ``file``, ``bytes``, ``difference`` (relative, of the logits), ``tolerance`` and ``holds``.

    Raises:
        UserError: it cannot be exported, or says something else than the network.
    """
    file, onnx = folder / FILES[kind], kind == "onnx"
    rounded = {n: m for n, m in module.named_modules() if isinstance(m, RoundedConv2d | RoundedLinear)}
    types = {name: stored_type(layer.rounding.weight, onnx) for name, layer in rounded.items()}
    program = traced(with_codes(module, onnx), x)
    try:
        found = _onnx_logits(program, x, file, types) if onnx else _program_logits(program, x, file)
    except OSError:
        raise
    except Exception as error:  # an exporter and a runtime may fail in any way
        file.unlink(missing_ok=True)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"not written: {said}", file.name) from None
    with torch.no_grad():
        meant = logits(module, x)
    difference = float((found - meant).norm() / meant.norm().clamp(min=1e-30))
    tolerance = ROUNDED if any(m.rounding.inputs is not None for m in rounded.values()) else EXACT
    if not difference <= tolerance:
        file.unlink()
        raise UserError(f"not written: its logits differ by {difference:.1e}, more than {tolerance:g}", file.name)
    return {
        "file": file.name, "bytes": file.stat().st_size, "difference": difference, "tolerance": tolerance,
        "holds": _contents(module, types),
    }  # fmt: skip


class _Classifier(nn.Module):
    """Images to logits, whatever the network wraps them in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.network, images)


def _program_logits(program: Any, x: Tensor, file: Path) -> Tensor:
    torch.export.save(program, file)
    with torch.no_grad():
        return cast(Tensor, torch.export.load(file).module()(x))


def _onnx_logits(program: Any, x: Tensor, file: Path, types: dict[str, str]) -> Tensor:
    import onnxruntime

    with _quiet():
        made: Any = torch.onnx.export(
            program, (x,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"],
            verbose=False,
        )  # fmt: skip
    _narrow(made.model.graph.initializers, types)
    made.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _narrow(initializers: Any, types: dict[str, str]) -> None:
    """Gives codes the types that torch has none of, or none that it exports."""
    import ml_dtypes
    import onnx_ir as ir

    for layer, name in types.items():
        if name not in ("INT4", "FLOAT8E4M3FN"):
            continue
        for part in ("codes", "zero"):
            value = initializers.get(f"network.{layer}.{part}")
            if value is None:
                continue
            plain, dtype = value.const_value.numpy(), ir.DataType[name]
            held = plain.astype(ml_dtypes.int4) if name == "INT4" else plain.view(ml_dtypes.float8_e4m3fn)
            value.const_value = ir.Tensor(held, dtype=dtype, name=value.name)
            value.type = ir.TensorType(dtype)


def _contents(module: nn.Module, types: dict[str, str]) -> str:
    """``INT8 weights in 15 layers, FLOAT in 1``."""
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    held = [types.get(name, "FLOAT") for name in layers]
    counts = {kind: held.count(kind) for kind in sorted(set(held), key=lambda kind: -held.count(kind))}
    first, *rest = [f"{kind}{{}} in {count}" for kind, count in counts.items()]
    return ", ".join([f"{first.format(' weights')} layers", *(text.format("") for text in rest)])


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters say about packages that are not needed here is for others."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
