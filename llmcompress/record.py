"""The small files of a result: its configuration, its recipe, and the record of what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcompress.calibration import Calibration
from llmcompress.export.checkpoint import sha256
from llmcompress.export.destination import RECORD
from llmcompress.export.quantized import Scheme, quantization_config
from llmcompress.model.load import BlockwiseModel
from llmcompress.recipe import Recipe
from llmcompress.report import Report


def new_record(report: Report, recipe: Recipe, calibration: Calibration, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the folder says about itself: pattern and counts per matrix, versions, seed, hashes.

    Args:
        report: of the run so far.
        recipe: as it was run.
        calibration: which rows were asked for.
        hashes: of the shards.
    """
    return {
        "model": report.model,
        "recipe": {"name": recipe.name, "hash": recipe.hash},
        "command": "",  # its place among the others
        "seed": report.seed,
        "versions": report.versions,
        "calibration": asdict(calibration),
        "pattern": str(recipe.sparsity) if recipe.sparsity else "dense",
        "structure": report.structure,
        "matrices": {
            m.name: {"shape": list(m.shape), "zeros": round(m.sparsity * m.weights), "bits": m.bits}
            for m in report.matrices
        },
        "sha256": dict(hashes),
    }


def small_files(
    model: BlockwiseModel, schemes: Mapping[str, Scheme], recipe: Recipe, record: dict[str, Any],
    copied: Mapping[Path, Path],
) -> dict[str, str]:  # fmt: skip
    """``config.json``, ``recipe.yaml`` and the record, which gets the hashes of the others.

    Args:
        model: that was walked.
        schemes: of its quantized matrices, by module name.
        recipe: as it was run.
        record: see `new_record`.
        copied: files that are copied into the folder, by the name they get there.
    """
    config = dict(model.checkpoint.config)
    if schemes:
        stored = {model.stored_name(name): scheme for name, scheme in schemes.items()}
        linears = [model.stored_name(name) for name in model.linears]
        config["quantization_config"] = quantization_config(stored, linears, bool(recipe.kv_cache))
    # what the input says stays as it is: Infinity, which some have, and halves of surrogates
    files = {"config.json": json.dumps(config, indent=2) + "\n", "recipe.yaml": recipe.to_yaml()}
    record["sha256"] |= {name.as_posix(): sha256(path) for name, path in copied.items()}
    record["sha256"] |= {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()}
    return files | {RECORD: json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
