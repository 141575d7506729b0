"""A folder of weight-only integers in GPTQ's layout (`llmcompress.export.gptq`), written block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

import llmcompress
from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.export import gptq
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.destination import RECORD
from llmcompress.export.quantized import unpack
from llmcompress.export.rewriting import conversion_record
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel


def to_gptq(folder: Path, output: Path, kind: str, force: bool = False) -> dict[str, int]:
    """Writes ``output``: the codes and scales of ``folder`` in GPTQ's layout.

    Args:
        folder: of a checkpoint whose blocks' Linears all have one grid, inputs left alone.
        output: to write.
        kind: one of `gptq.KINDS`.
        force: replace an earlier output of this program.

    Returns:
        Bytes of the tensors, ``before`` and ``after``.

    Raises:
        UserError: the layout has no room for what the folder holds, or ``output`` may not be written.
    """
    checkpoint = Checkpoint(folder)
    model = BlockwiseModel(checkpoint, checkpoint.dtype)
    config = gptq.configuration(_common_grid(model), gptq.KINDS[kind], f"llmcompress:{llmcompress.__version__}")
    with CheckpointWriter(output, force, folder) as writer:
        for index in range(len(model.blocks)):
            writer.add(_block(model, index, gptq.KINDS[kind]))
        for names in checkpoint.in_chunks(model.rest_sources()):
            writer.add(checkpoint.read(names))
        record = conversion_record(folder, kind, writer.hashes)
        files = {
            "config.json": _json(checkpoint.config | {"quantization_config": config}),
            "quantize_config.json": _json(config),
            RECORD: _json(record),
        }
        writer.finish(files, copy_from=folder)
    return {"before": checkpoint.size_bytes, "after": writer.total_bytes}


def _common_grid(model: BlockwiseModel) -> QuantGrid:
    """The grid that every Linear of the blocks has, and no other matrix."""
    where = str(model.checkpoint.folder)
    if "qweight" in {name.rpartition(".")[2] for name in model.checkpoint.tensors}:
        raise UserError("is in GPTQ's layout already", where, "give a folder of compressed-tensors")
    if not model.schemes:
        raise UserError("holds no quantized matrices", where, "give the folder of e.g. gptq-w4a16")
    if model.checkpoint.config["quantization_config"].get("kv_cache_scheme"):
        raise UserError(
            "has scales of keys and values, which GPTQ's layout has not", where, "quantize without kv_cache"
        )
    inside = [name for name in model.linears if any(name.startswith(block.name + ".") for block in model.blocks)]
    dense = sorted(set(inside) - model.schemes.keys())
    if dense:
        raise UserError(f"leaves {dense[0]} dense", where, "GPTQ's layout wants every Linear of a block quantized")
    grids = {scheme.weights for scheme in model.schemes.values()}
    outside = sorted(model.schemes.keys() - set(inside))
    if len(grids) > 1 or outside:
        what = f"quantizes {outside[0]}, outside the blocks" if outside else f"has {len(grids)} grids"
        raise UserError(what, where, "GPTQ's layout has one grid, and that in the blocks only")
    for name, scheme in model.schemes.items():
        linear = model.model.get_submodule(name)
        why = gptq.why_not(scheme.weights, linear.out_features, linear.in_features)
        if scheme.activations is not None or scheme.outputs is not None:
            why = "its inputs or outputs are rounded, and GPTQ's layout has weights only"
        if why:
            raise UserError(f"{name}: {why}", where, "use the compressed-tensors folder as it is")
    return grids.pop()


def _block(model: BlockwiseModel, index: int, checkpoint_format: str) -> dict[str, Tensor]:
    """The tensors of one block by their names in the new folder."""
    prefix = model.blocks[index].name + "."
    quantized = {model.stored_name(name): name for name in model.schemes if name.startswith(prefix)}
    others = [s for s in model.block_sources(index) if not _belongs(s, quantized)]
    found = model.checkpoint.read(others)
    for stem, name in quantized.items():
        try:
            parts = gptq.pack(unpack(model.stored_tensors(name), model.schemes[name]), checkpoint_format)
        except ValueError as error:
            raise UserError(
                f"{name}: {error}", str(model.checkpoint.folder), "try gptq-v2, or another recipe"
            ) from error
        found |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    return found


def _belongs(source: str, stems: dict[str, str]) -> bool:
    stem, _, ending = source.rpartition(".")
    return stem in stems and ending != "bias"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
