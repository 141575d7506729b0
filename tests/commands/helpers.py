"""What tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, Tensor]


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, hidden or not, and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the package."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
