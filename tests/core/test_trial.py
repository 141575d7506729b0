"""Choosing by trials."""

import torch
from scipy.stats import ttest_rel

from llmcompress.core.trial import clearly_least


def test_a_choice_that_is_better_by_less_than_the_noise_is_not_taken() -> None:
    """Choices that do not differ win at most as often as three standard errors allow: 0.13 %."""
    generator = torch.Generator().manual_seed(0)
    taken = 0
    for _ in range(1000):
        plain, other = torch.rand(2, 100, generator=generator)
        taken += clearly_least({"plain": plain, "other": other}, "plain") == "other"
    assert taken <= 6


def test_a_small_gain_on_every_token_is_clear_however_much_the_tokens_differ() -> None:
    plain = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 8
    assert clearly_least({0: plain, 1: 0.99 * plain, 2: 0.999 * plain}, 0) == 1


def test_clear_is_what_a_paired_test_says() -> None:
    generator = torch.Generator().manual_seed(1)
    for shift in torch.linspace(-0.2, 0.4, 40):
        plain, other = torch.rand(2, 64, generator=generator, dtype=torch.float64)
        other -= shift
        clear = ttest_rel(plain, other).statistic > 3
        assert clearly_least({"plain": plain, "other": other}, "plain") == ("other" if clear else "plain")


def test_one_token_shows_nothing() -> None:
    assert clearly_least({"plain": torch.ones(1), "other": torch.zeros(1)}, "plain") == "plain"
