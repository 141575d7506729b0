"""Perplexity, KL and agreement against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from llmcompress.evaluate import divergence
from llmcompress.evaluate.divergence import Comparison, Divergence


def batch(rows: int, length: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = 3 * torch.randn(rows, length, vocabulary, generator=generator)
    compressed = dense + 0.5 * torch.randn(rows, length, vocabulary, generator=generator)
    return dense, compressed, torch.randint(vocabulary, (rows, length), generator=generator)


def compared(*batches: tuple[Tensor, Tensor, Tensor]) -> Divergence:
    comparison = Comparison()
    for dense, compressed, tokens in batches:
        comparison.update(dense, compressed, tokens)
    return comparison.result()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 17), st.integers(0, 1000))
def test_figures_are_their_definitions(rows: int, length: int, vocabulary: int, seed: int) -> None:
    dense, compressed, tokens = batch(rows, length, vocabulary, seed)
    found = compared((dense, compressed, tokens))
    losses, kl, agreed = [[], []], [], []
    for row in range(rows):
        for t in range(length - 1):
            p, q = (log_softmax(x[row, t].double().numpy()) for x in (dense, compressed))
            losses[0].append(-p[tokens[row, t + 1]])
            losses[1].append(-q[tokens[row, t + 1]])
            kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            agreed.append(p.argmax() == q.argmax())
    count = rows * (length - 1)
    assert found.tokens == count
    assert found.perplexity_before == pytest.approx(math.exp(sum(losses[0]) / count), rel=1e-5)
    assert found.perplexity_after == pytest.approx(math.exp(sum(losses[1]) / count), rel=1e-5)
    assert found.kl_divergence == pytest.approx(sum(kl) / count, rel=1e-4, abs=1e-6)
    assert found.top1_agreement == pytest.approx(sum(agreed) / count)


def test_a_model_does_not_diverge_from_itself() -> None:
    dense, _, tokens = batch(3, 5, 11)
    found = compared((dense, dense.clone(), tokens))
    assert found.kl_divergence == 0 and found.top1_agreement == 1
    assert found.perplexity_before == found.perplexity_after and found.kl_stderr == 0


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    tokens = batch(2, 6, 13)[2]
    found = compared((torch.zeros(2, 6, 13), torch.full((2, 6, 13), 7.0), tokens))
    assert found.perplexity_before == pytest.approx(13) and found.perplexity_after == pytest.approx(13)


def test_micro_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compressed, tokens = batch(6, 8, 11)
    whole = compared((dense, compressed, tokens))
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 33)  # three positions at a time
    parts = compared(*[(dense[i : i + 2], compressed[i : i + 2], tokens[i : i + 2]) for i in (0, 2, 4)])
    for name, value in vars(whole).items():
        assert getattr(parts, name) == pytest.approx(value, rel=1e-6), name


def test_the_standard_error_is_that_of_a_bootstrap_over_rows() -> None:
    dense, compressed, tokens = batch(40, 6, 11)
    found = compared((dense, compressed, tokens))
    rows = [compared((dense[i : i + 1], compressed[i : i + 1], tokens[i : i + 1])) for i in range(40)]
    picks = torch.randint(40, (20_000, 40), generator=torch.Generator().manual_seed(0))
    kl = torch.tensor([row.kl_divergence for row in rows])
    ratio = torch.tensor([math.log(row.perplexity_after / row.perplexity_before) for row in rows])
    assert found.kl_stderr == pytest.approx(kl[picks].mean(1).std().item(), rel=0.05)
    assert found.log_perplexity_stderr == pytest.approx(ratio[picks].mean(1).std().item(), rel=0.05)
    assert rows[0].kl_stderr is None


def test_bfloat16_logits_are_added_up_in_higher_precision() -> None:
    dense, compressed, tokens = batch(4, 9, 11)
    low = (dense.bfloat16(), compressed.bfloat16(), tokens)
    assert vars(compared(low)) == vars(compared((low[0].float(), low[1].float(), tokens)))


def test_a_broken_model_has_infinite_perplexity() -> None:
    dense, compressed, tokens = batch(2, 4, 7)
    assert compared((dense, compressed * 1e5, tokens)).perplexity_after == math.inf


def test_shapes_that_do_not_match_are_refused() -> None:
    dense, compressed, tokens = batch(2, 4, 7)
    with pytest.raises(ValueError, match="do not match"):
        Comparison().update(dense, compressed, tokens[:, :3])
    with pytest.raises(ValueError, match="two tokens"):
        Comparison().update(dense[:, :1], compressed[:, :1], tokens[:, :1])
    with pytest.raises(ValueError, match="no predictions"):
        Comparison().result()
