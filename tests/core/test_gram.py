"""The Gram matrix of bfloat16 rows is the exact one but for the rounding of float32 sums."""

from __future__ import annotations

import pytest
import torch

from llmcompress.core.kernels import gram_cpu
from llmcompress.core.stats import InputStats, add_gram, mirror

COMPILED = pytest.mark.skipif(
    not gram_cpu.multiplies(torch.zeros(1, gram_cpu.LEAST_WIDTH, dtype=torch.bfloat16)),
    reason="this processor does not multiply bfloat16 pairs",
)


def rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(width, generator=draw).exp()  # columns of different sizes, as activations have them
    return (torch.randn(tokens, width, generator=draw) * spread).bfloat16()


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double()


def close(found: torch.Tensor, x: torch.Tensor) -> bool:
    """Errors are measured against what was summed: norms of the two columns."""
    norms = x.double().norm(dim=0)
    return bool(((found.double() - exact(x)).abs() <= 4e-6 * norms * norms[:, None]).all())


@pytest.mark.parametrize("width", [256, 288, 1056, 250, 64])
@pytest.mark.parametrize("tokens", [1, 2, 7, 1023, 1024, 1025, 2600])
def test_it_is_the_float64_one(tokens: int, width: int) -> None:
    x, total = rows(tokens, width), torch.zeros(width, width)
    add_gram(total, x)
    assert close(mirror(total), x)


@pytest.mark.parametrize("width", [256, 1024])
def test_it_is_added(width: int) -> None:
    x, y, total = rows(40, width), rows(33, width, 1), torch.zeros(width, width)
    add_gram(total, x)
    add_gram(total, y)
    assert close(mirror(total), torch.cat([x, y]))


@COMPILED
def test_any_number_of_threads_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = rows(1500, 352), []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        total = torch.zeros(352, 352)
        gram_cpu.add_gram(total, x)
        found.append(mirror(total))
    assert all(torch.equal(total, found[0]) for total in found)


@COMPILED
def test_rows_that_are_not_contiguous_are_taken_too() -> None:
    x = rows(300, 512)
    total = torch.zeros(256, 256)
    gram_cpu.add_gram(total, x[::3, ::2])
    assert close(mirror(total), x[::3, ::2])


def test_statistics_of_bfloat16_rows_are_those_of_the_same_rows_in_float32() -> None:
    x, needs = rows(90, 256), ("gram", "squares", "absmax", "mean")
    one, two = InputStats(256, needs), InputStats(256, needs)
    one.update(x)
    two.update(x.float())
    assert close(one.gram * 90, x) and close(two.gram * 90, x)
    for kind in ("squares", "absmax", "mean"):
        assert torch.equal(one.sums[kind], two.sums[kind])


@pytest.mark.parametrize("x", [rows(4, 250), rows(4, 32), rows(4, 256).float(), rows(4, 256).half()])
def test_rows_it_is_not_made_for_are_left_to_others(x: torch.Tensor) -> None:
    assert not gram_cpu.multiplies(x)
