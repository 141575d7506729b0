"""What is no text to calibrate on, and a Hub that cannot be reached, are named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.helpers import python


@pytest.mark.parametrize("option", ["--calibration", "--eval-text"])
def test_texts_without_enough_tokens_are_refused_before_the_model_writes_any(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("llmcompress.source.self_samples", None)  # is not reached
    for name, content, line in [
        ("none.txt", "", "none.txt: is empty: 0 tokens"),
        ("short.txt", "w1 w2 w3", "short.txt: 3 tokens, but"),
        ("none.jsonl", "", "none.jsonl: is empty: 0 tokens"),
        ("bad.jsonl", '{"text": "w1"}\n{', "bad.jsonl, line 2: is not JSON"),
    ]:
        (tmp_path / name).write_text(content)
        assert line in refusal(option, name)


def test_a_text_needs_a_tokenizer(refusal: Callable[..., str], altered: Callable[..., Path]) -> None:
    folder = altered()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "its tokenizer cannot be read" in (line := refusal(model=folder)) and "calibrate on 'self'" in line


def test_what_is_neither_file_nor_data_set_is_refused(refusal: Callable[..., str]) -> None:
    assert "neither 'self' nor a file" in refusal(calibration="a/b/c")


def test_a_hub_model_or_data_set_is_one_line_when_offline(refusal: Callable[..., str]) -> None:
    line = "someone/something: cannot be fetched from the Hub"
    assert line in refusal(model="someone/something")
    assert "someone/texts:train: cannot be reached" in refusal(calibration="someone/texts:train")


def test_a_hub_that_does_not_answer_does_not_hang(tmp_path: Path) -> None:
    script = """
from llmcompress.errors import UserError
from llmcompress.model.locate import locate
try:
    locate("someone/something")
except UserError as error:
    print(error)
"""
    said = python(script, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert "someone/something: cannot be fetched from the Hub" in said.stdout and said.stdout.count("\n") == 1
