"""Where token rows come from, and what is said when they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmcompress import sampling
from llmcompress.calibration import Calibration, evaluation_rows, token_rows
from llmcompress.errors import UserError
from llmcompress.sampling import self_samples
from tests.architectures import tiny_model

WORDS = [f"w{i}" for i in range(80)]
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] + ' ' }}{% endfor %}"


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """One token per word, BOS in front, as Llama's tokenizer has it."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 64 positions and a tokenizer of words."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    write_tokenizer(path, TEMPLATE)
    return path


def text_of(count: int) -> str:
    return " ".join(WORDS[(7 * i) % 80] for i in range(count))


def test_a_text_is_tokenised_in_one_piece_and_cut_without_overlap(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(text_of(10_000))
    ids = AutoTokenizer.from_pretrained(folder)(text_of(10_000))["input_ids"]
    rows = token_rows(Calibration(str(file), 5, 16), folder)
    assert rows.dtype == torch.int64 and rows.tolist() == [ids[i * 16 : (i + 1) * 16] for i in range(5)]
    rows = token_rows(Calibration(str(file), 600, 16), folder)
    assert rows.flatten().tolist() == ids[: 600 * 16]


def test_an_evaluation_takes_whole_rows_up_to_its_limit(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(text_of(100))  # and BOS: 101 tokens
    assert evaluation_rows(file, folder, 16).shape == (6, 16)
    assert evaluation_rows(file, folder, 16, max_tokens=40).shape == (2, 16)
    assert evaluation_rows(file, folder, 16, max_tokens=3).shape == (1, 16)
    with pytest.raises(UserError, match=r"book.txt: 3 tokens, but one row of 16 needs 16"):
        file.write_text("w1 w2") and evaluation_rows(file, folder, 16)


def test_stored_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)  # and no tokenizer
    rows = torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows, "attention_mask": torch.ones(6, 16)}, tmp_path / "rows.safetensors")
    file = str(tmp_path / "rows.safetensors")
    assert torch.equal(token_rows(Calibration(file, 6, 16), tmp_path), rows)
    assert torch.equal(token_rows(Calibration(file, 2, 16), tmp_path), rows[:2])
    assert torch.equal(evaluation_rows(file, tmp_path, 16), rows)
    assert torch.equal(evaluation_rows(file, tmp_path, 16, max_tokens=40), rows[:2])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens": torch.zeros(4, 16)}, "holds no tensor input_ids, but tokens; store the rows as input_ids"),
        ({"input_ids": torch.zeros(4, 16, dtype=torch.int32)}, "input_ids is int32 of shape (4, 16); store int64"),
        ({"input_ids": torch.zeros(64, dtype=torch.int64)}, "input_ids is int64 of shape (64,); store int64 of shape"),
        ({"input_ids": torch.zeros(4, 8, dtype=torch.int64)}, "its rows have 8 tokens, not 16; use --length 8"),
        ({"input_ids": torch.zeros(2, 16, dtype=torch.int64)}, "32 tokens, but 4 rows of 16 need 64"),
        ({"input_ids": torch.full((4, 16), 96)}, "token 96, but the model knows 0 to 95"),
        ({"input_ids": torch.full((4, 16), -100)}, "token -100, but the model knows 0 to 95"),
        (None, "is not a safetensors file"),
    ],
)
def test_bad_stored_rows_are_one_line(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, message: str
) -> None:
    file = tmp_path / "rows.safetensors"
    file.write_text("w1 w2") if tensors is None else save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        token_rows(Calibration(str(file), 4, 16), folder)
    assert str(caught.value).startswith(str(file)) and message in str(caught.value) and "\n" not in str(caught.value)


def test_documents_are_joined_with_end_of_sequence(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    records = [
        {"text": "w0 w1"},
        {"text": "  "},
        {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]},
        {"prompt": "w4", "completion": "w5"},
    ]
    file.write_text("\n\n".join(map(json.dumps, records)))
    bos, end, user, assistant = 1, 2, 3, 4
    w = [5, 6, 7, 8, 9, 10]
    conversation = [bos, user, w[2], bos, assistant, w[3], end, bos, user, w[4], bos, assistant, w[5], end]
    rows = token_rows(Calibration(str(file), 2, 9), folder)
    assert rows.flatten().tolist() == [bos, w[0], w[1], end, *conversation]


def test_a_folder_that_datasets_reads_is_a_source(folder: Path, tmp_path: Path) -> None:
    records = [json.dumps({"text": f"w{i} w{i + 1}"}) for i in range(10)]
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    (tmp_path / "test.jsonl").write_text("\n".join(reversed(records)))
    assert token_rows(Calibration(str(tmp_path), 2, 4), folder).tolist() == [[1, 5, 6, 2], [1, 6, 7, 2]]
    assert token_rows(Calibration(f"{tmp_path}:test", 2, 4), folder).tolist() == [[1, 14, 15, 2], [1, 13, 14, 2]]
    with pytest.raises(UserError, match="cannot be read"):
        token_rows(Calibration(f"{tmp_path}:nosuch", 2, 4), folder)


def test_a_data_set_without_a_network_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/data' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^owner/data:train: cannot be reached .* connect to the network, or give"):
        token_rows(Calibration("owner/data:train", 2, 4), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.txt: is empty: 0 tokens, and 64 are needed"),
        (" \n ", "data.txt: is empty"),
        (text_of(39), "data.txt: 40 tokens, but 4 rows of 16 need 64; give a longer text or --samples 2"),
        (text_of(9), "data.txt: 10 tokens, but 4 rows of 16 need 64; give a longer text or a smaller --length"),
        (b"w1 \xff\xfe w2", "data.txt: is not UTF-8 text"),
    ],
)
def test_a_bad_text_is_one_line(folder: Path, tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        token_rows(Calibration(str(file), 4, 16), folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w1"}\n{"content": "w1"}', "line 2: has no text, messages or prompt; rename one of its fields: con"),
        ('{"text": "w1"}\n\n{"text": ', "line 3: is not JSON"),
        ('["w1"]', "line 1: is not a JSON object"),
        (b'{"text": "\xff"}', "line 1: is not UTF-8"),
        ('{"messages": [{"role": "user"}]}', "line 1: does not fit the chat template"),
        ("", "data.jsonl: is empty: 0 tokens"),
        ('{"text": "w1"}', "data.jsonl: 3 tokens, but 4 rows of 16 need 64"),
    ],
)
def test_a_bad_jsonl_names_its_line(folder: Path, tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        token_rows(Calibration(str(file), 4, 16), folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1"}')
    with pytest.raises(UserError, match="no chat template"):
        token_rows(Calibration(str(tmp_path / "data.jsonl"), 1, 2), tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt: no such file"),
        ("far/away/missing.jsonl", "no such file"),
        ("missing.safetensors", "no such file"),
        ("/no/such/folder", "neither 'self' nor a file"),
        ("what is this", "neither 'self' nor a file"),
        ("name:a:b:c", "too many or empty parts"),
        (__file__, "unknown kind of file '.py'"),
    ],
)
def test_an_unknown_source_is_refused(folder: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_rows(Calibration(source, 2, 4), folder)


def test_rows_longer_than_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text_of(200))
    for source in ("self", str(tmp_path / "book.txt")):
        with pytest.raises(UserError, match="65 tokens are more than the model's 64 positions; use at most 64"):
            token_rows(Calibration(source, 2, 65), folder)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "book.txt").write_text(text_of(200))
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        token_rows(Calibration(str(tmp_path / "book.txt"), 2, 4), tmp_path)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=40).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "book.txt").write_text(text_of(200))
    with pytest.raises(UserError, match="the tokenizer gives token 84, the model knows 40"):
        token_rows(Calibration(str(tmp_path / "book.txt"), 2, 40), tmp_path)


@pytest.mark.parametrize("fields", [{"samples": 0}, {"length": 1}, {"seed": -1}])
def test_impossible_numbers_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Calibration("self", **fields)


def test_a_sequence_depends_on_its_seed_and_number_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = self_samples(folder, [(3, 24, 0), (5, 16, 7)])
    assert first.shape == (3, 24) and second.shape == (5, 16)
    assert torch.equal(second, self_samples(folder, [(5, 16, 7)])[0])
    monkeypatch.setattr(sampling, "MAX_BATCH", 2)
    torch.manual_seed(99)
    again = self_samples(folder, [(5, 16, 7), (3, 24, 0)])
    assert torch.equal(again[0], second) and torch.equal(again[1], first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(self_samples(folder, [(3, 24, 1)])[0], first)


def test_sampling_leaves_other_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_samples(folder, [(2, 8, 0)])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom"])
def test_tokens_follow_the_models_own_distribution(architecture: str, tmp_path: Path) -> None:
    """Inverse-CDF sampling on full forwards without a cache, from the same uniform numbers."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    (rows,) = self_samples(tmp_path, [(4, 20, 3)])
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()
    ends = model.config.eos_token_id
    if ends is not None and ends < logits.shape[-1]:
        logits[:, :, ends] = -torch.inf
        assert not (rows == ends).any()
    cumulative = logits.softmax(-1).cumsum(-1)
    for number, row in enumerate(rows):
        uniform = sampling._stream(3, number, 20)
        for t in range(1, 20):
            above = cumulative[number, t - 1, row[t]]
            below = cumulative[number, t - 1, row[t] - 1] if row[t] > 0 else 0.0
            assert below - 1e-5 <= uniform[t] <= above + 1e-5


def test_samples_begin_with_bos_or_anywhere(folder: Path, tmp_path: Path) -> None:
    assert (self_samples(folder, [(4, 4, 0)])[0][:, 0] == 1).all()
    tiny_model("llama", bos_token_id=None).save_pretrained(tmp_path)
    first = self_samples(tmp_path, [(64, 2, 0)])[0][:, 0]
    assert len(first.unique()) > 30 and first.min() >= 0 and first.max() < 96


def test_progress_adds_up_to_the_tokens(folder: Path) -> None:
    seen: list[int] = []
    self_samples(folder, [(3, 24, 0), (5, 16, 7)], advance=seen.append)
    assert sum(seen) == 3 * 24 + 5 * 16


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "available_memory", lambda device: 1000)
    monkeypatch.setattr(sampling.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"sampling from the model needs .* give a text file"):
        self_samples(folder, [(3, 24, 0)])


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: NaN or infinite weights"):
        self_samples(tmp_path, [(1, 4, 0)])
