"""What several test files read and none writes: a tiny checkpoint with a tokenizer, and a text for it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.architectures import tiny_folder

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]  # as many as the tiny models have tokens


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama of hidden size 32 in float32, with a tokenizer that knows the words w0 to w92."""
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 words that the tokenizer of `checkpoint` knows."""
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(WORDS[3 + 7 * i * i % 93] for i in range(600)), encoding="utf-8")
    return file
