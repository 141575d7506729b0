"""A view's rows times its matrix are the module's output, and what is written into it is what the module computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llmcompress.core.grid import QuantGrid
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.sparsity import Sparsity
from llmcompress.core.stats import InputStats
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.magnitude import Magnitude
from llmcompress.methods.rtn import RTN
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.model.matrix import MatrixView

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def multiplied(view: MatrixView, x: torch.Tensor) -> torch.Tensor:
    """(tokens, out) rows times matrix, the outputs of all parts side by side."""
    return torch.cat([part.rows(x).float() @ part.read().T for part in view.parts()], 1)


def outputs(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(tokens, out) of the module itself, without its bias."""
    y = conv(x) if conv.bias is None else conv(x) - conv.bias[:, None, None]
    return y.movedim(-3, -1).reshape(-1, conv.out_channels)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    kernel=PAIRS,
    stride=PAIRS,
    dilation=PAIRS,
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    images=st.integers(0, 2),
)
@torch.no_grad()
def test_rows_times_matrix_are_the_convolutions_output(
    groups: int, channels: tuple, kernel: tuple, stride: tuple, dilation: tuple, padding: object, mode: str, images: int
) -> None:
    assume(padding != "same" or stride == (1, 1))
    torch.manual_seed(sum(kernel) + 7 * sum(stride))
    sizes = (groups * channels[0], groups * channels[1])
    conv = nn.Conv2d(*sizes, kernel, stride, padding, dilation, groups, padding_mode=mode)
    x = torch.randn((images, sizes[0], 8, 9) if images else (sizes[0], 8, 9))
    torch.testing.assert_close(multiplied(MatrixView("conv", conv), x), outputs(conv, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_times_matrix_are_the_output_of_what_is_no_convolution() -> None:
    x = torch.randn(2, 5, 6)
    for module in (nn.Linear(6, 4, bias=False), Conv1D(4, 6)):
        if isinstance(module, Conv1D):
            module.bias.zero_()
        torch.testing.assert_close(multiplied(MatrixView("m", module), x), module(x).view(-1, 4))


@pytest.mark.parametrize("groups", [1, 2, 6])
@torch.no_grad()
def test_what_is_written_part_by_part_is_what_the_convolution_multiplies(groups: int) -> None:
    conv = nn.Conv2d(6, 12, 3, groups=groups).to(memory_format=torch.channels_last)
    parts = MatrixView("conv", conv).parts()
    stored = torch.zeros_like(conv.weight, memory_format=torch.contiguous_format)
    written = [torch.randn(part.shape) for part in parts]
    for part, weight in zip(parts, written, strict=True):
        assert part.shape == (12 // groups, 6 // groups * 9)
        part.write(weight)
        part.store(weight, stored)
        assert torch.equal(part.read(), weight)
    assert torch.equal(conv.weight, stored)
    x = torch.randn(2, 6, 7, 7)
    expected = torch.cat([p.rows(x) @ w.T for p, w in zip(parts, written, strict=True)], 1)
    torch.testing.assert_close(outputs(conv, x), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_several_groups_is_no_single_matrix() -> None:
    with pytest.raises(ValueError, match="parts"):
        MatrixView("conv", nn.Conv2d(4, 4, 3, groups=2)).read()


@torch.no_grad()
def error_of(methods: tuple[Method, ...], groups: int) -> float:
    """Relative error of a convolution's own output once its parts went through the methods."""
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, bias=False)
    x = F.avg_pool2d(torch.randn(6, 8, 26, 26), 3, 1) * torch.logspace(0, 1, 8)[:, None, None]  # neighbours correlate
    before = conv(x)
    for part in MatrixView("conv", conv).parts():
        rows = part.rows(x)
        stats = InputStats(part.shape[1], frozenset().union(*(m.needs for m in methods)))
        stats.update(rows)
        group = MatrixGroup([Matrix(part.label, part.read())])
        run_methods(methods, group, stats)
        part.write(group.matrices[0].weight)
    return float((conv(x) - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_compensation_lowers_the_error_of_a_convolutions_output(groups: int) -> None:
    half, int3 = Sparsity.parse(0.5), QuantGrid(3)
    assert error_of((SparseGPT(half),), groups) < 0.6 * error_of((Magnitude(half),), groups)
    assert error_of((GPTQ(int3),), groups) < 0.6 * error_of((RTN(int3),), groups)
