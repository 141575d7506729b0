"""bitsandbytes' int8 (LLM.int8) and NF4, on top of what pruning or smoothing made of the weights: written by
transformers and read by it, through its BitsAndBytesConfig. bitsandbytes rounds by itself, so it takes floating-point
weights only, and it holds the whole model in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.errors import UserError
from llmcompress.export.companions import companions
from llmcompress.export.destination import RECORD, sha256
from llmcompress.export.rewriting import conversion_record, new_folder

KINDS = ("bitsandbytes-int8", "bitsandbytes-nf4")


def to_bitsandbytes(folder: Path, output: Path, kind: str, force: bool = False) -> dict[str, int]:
    """Writes ``output``: the model of ``folder`` with its Linears, head excepted, rounded by bitsandbytes.

    Args:
        folder: of a checkpoint in floating point.
        output: to write.
        kind: one of KINDS.
        force: replace an earlier output of this program.

    Returns:
        Bytes of the weight files, ``before`` and ``after``.

    Raises:
        UserError: it is quantized already, bitsandbytes is not installed, or ``output`` may not be written.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise UserError("is quantized already", str(folder), "give pruned or smoothed weights, e.g. of sparsegpt-50")
    with new_folder(output, force, folder) as partial:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=_settings(kind), device_map="cpu", local_files_only=True
            )
        except ImportError as error:
            raise UserError("bitsandbytes is not installed", kind, "pip install 'llmcompress[bitsandbytes]'") from error
        model.save_pretrained(partial)
        for path in companions(folder):
            place = partial / path.relative_to(folder)
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
        shards = sorted(partial.glob("*.safetensors"))
        record = conversion_record(folder, kind, {shard.name: sha256(shard) for shard in shards})
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        after = sum(shard.stat().st_size for shard in shards)
    return {"before": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "after": after}


def _settings(kind: str) -> BitsAndBytesConfig:
    if kind == "bitsandbytes-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
