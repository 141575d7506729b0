"""Windows: each token once, from as much context as promised, and those of lm-eval."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.evaluate.windows import batches_of, rolling_windows, row_windows

PREFIX = 999


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_rolling_windows_predict_every_token_once_from_what_stands_before_it(
    count: int, length: int, step: int
) -> None:
    tokens, stride = list(range(count)), min(step, length)
    predicted = []
    for window in rolling_windows(tokens, PREFIX, length, stride):
        inputs, targets = window.inputs.tolist(), window.targets.tolist()
        assert 1 <= len(inputs) <= length
        for place, target in enumerate(targets):
            context = inputs[: window.first + place]
            before = [PREFIX, *tokens][: target + 1]
            assert context == before[len(before) - len(context) :]
            if predicted and place == 0:
                assert len(context) >= min(target + 1, length - stride + 1)
        predicted += targets
    assert predicted == tokens


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_rolling_windows_are_those_of_lm_eval(count: int, length: int, step: int) -> None:
    theirs = pytest.importorskip("lm_eval.utils")
    tokens, stride = list(range(count)), min(step, length)
    expected = theirs.get_rolling_token_windows(tokens, PREFIX, length, length - stride + 1)
    ours = [(w.inputs.tolist(), w.targets.tolist()) for w in rolling_windows(tokens, PREFIX, length, stride)]
    for (inputs, targets), (their_inputs, their_targets) in zip(ours, expected, strict=True):
        assert targets == list(their_targets)
        assert inputs == list(their_inputs)[-len(inputs) :]
        # what lm-eval keeps beyond ours are inputs that no prediction needs
        assert len(inputs) >= len(targets)


def test_without_a_prefix_the_first_token_is_not_predicted() -> None:
    windows = rolling_windows(list(range(10)), None, 4, 4)
    assert [t for w in windows for t in w.targets.tolist()] == list(range(1, 10))


def test_rows_do_not_overlap_and_leave_their_first_token_and_the_rest_out() -> None:
    windows = row_windows(list(range(11)), 4)
    assert [(w.inputs.tolist(), w.targets.tolist()) for w in windows] == [
        ([0, 1, 2], [1, 2, 3]),
        ([4, 5, 6], [5, 6, 7]),
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 64))
def test_batches_hold_each_window_once_and_none_is_padded(documents: list[int], limit: int) -> None:
    windows = [w for count in documents for w in rolling_windows(list(range(count)), PREFIX, 8, 5)]
    batches = batches_of(windows, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(windows)))
    for batch in batches:
        lengths = {len(windows[i].inputs) for i in batch}
        assert len(lengths) == 1 and (len(batch) == 1 or len(batch) * lengths.pop() <= limit)
