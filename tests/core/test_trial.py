"""Choosing by trials."""

import pytest
import torch
from scipy.stats import ttest_rel

from llmcompress.core.group import Matrix, MatrixGroup
from llmcompress.core.stats import InputStats
from llmcompress.core.trial import Trials, clearly_least
from llmcompress.recipe import Recipe

INT6 = {"weights": "int6", "activations": "int6"}


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


@pytest.mark.parametrize(
    "stages",
    [
        [{"quantize": INT6}],
        [{"quantize": INT6 | {"method": "gptq"}}],
        [{"quantize": {"method": "gptq", "weights": "int4-g16-mse", "act_order": True}}],
        [{"prune": {"method": "wanda", "sparsity": 0.5}}],
        [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}, {"quantize": INT6 | {"method": "gptq"}}],
        [{"prune": {"method": "sparsegpt", "sparsity": 0.5, "refit": True, "grow": 2}}],
    ],
)
def test_a_trial_changes_neither_the_group_nor_the_next_trial(stages: list[dict[str, object]]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 32, generator=generator)
    group = MatrixGroup([Matrix("m", torch.randn(48, 32, generator=generator))])
    methods = Recipe.from_tree({"stages": stages}, "t").methods
    needs = frozenset({"rows"}).union(*(method.needs for method in methods))
    stats = InputStats(32, needs)
    stats.update(rows)
    before, held = group.matrices[0].weight.clone(), rows.clone()
    trials = Trials(group, stats, methods, number=1)
    first, second = trials.error(), trials.error()
    assert torch.equal(first, second)
    assert torch.equal(group.matrices[0].weight, before) and group.matrices[0].keep is None
    assert torch.equal(rows, held)
