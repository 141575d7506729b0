"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from llmcompress.core import sweep as sweep_module
from llmcompress.core.grid import QuantGrid
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.sweep import factorise, sweep, sweep_reference
from llmcompress.core.targets import Mask, Round

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(RUNS_TRITON, reason="the tests below run in this process")
def test_triton_kernels_in_the_interpreter():
    # Triton reads the variable when it is first imported, which may have happened in this process
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@pytest.fixture
def on_triton(monkeypatch):
    """Sends every sweep to the Triton kernels."""
    kernels = importlib.import_module("llmcompress.core.kernels.sweep_cuda")
    monkeypatch.setattr(sweep_module, "kernels_for", lambda device: kernels)


@pytest.mark.skipif(not RUNS_TRITON, reason="runs in the interpreter's process, started above")
@pytest.mark.parametrize("sparsity", [None, "0.5", "2:4", "held"])
@pytest.mark.parametrize("grid", [None, "int8", "int4-g12-asym"])
def test_triton_kernel_equals_the_reference(on_triton, sparsity, grid):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=random) @ (torch.randn(24, 24, generator=random) / 5 + 0.3 * torch.eye(24))
    W, H = torch.randn(21, 24, generator=random).to(DEVICE), (x.T @ x / 300).to(DEVICE)
    factor = factorise(H)

    def targets() -> tuple[Mask | None, Round | None]:
        mask = None
        if sparsity == "held":
            mask = Mask.held((torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5).to(DEVICE))
        elif sparsity is not None:
            mask = Mask(Sparsity.parse(sparsity), factor.V.diagonal(), len(W))
        return mask, None if grid is None else Round(QuantGrid.parse_weights(grid), W, torch.float32, mask)

    fast, slow = targets(), targets()
    Q, expected = sweep(W, factor, *fast), sweep_reference(W, factor, [t for t in slow if t is not None])
    rows_alike = ((Q - expected).abs() < 1e-4).all(1)  # a tie broken otherwise sends its row another way
    assert rows_alike.float().mean() > 0.9
    if fast[0] is not None and grid is None:
        assert torch.equal(fast[0].keep, slow[0].keep)
        assert rows_alike.all()
