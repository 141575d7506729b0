"""Whatever a file holds: one line of answer, little memory, nothing written elsewhere, nothing run."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmcompress import cli
from llmcompress.documents import jsonl_records
from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.inspection.inspect import inspect
from llmcompress.measure import peak_memory_bytes
from llmcompress.model.checkpoint import INDEX, Checkpoint, inside
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.plausible import BoundedFactories, require_plausible
from llmcompress.recipe import Recipe
from llmcompress.sampling import self_samples
from llmcompress.yaml12 import parse_value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
WORDS = st.sampled_from(
    [
        "stages",
        "prune",
        "quantize",
        "smooth",
        "clip",
        "method",
        "sparsity",
        "2:4",
        "int8",
        "wanda",
        "targets",
        "include",
    ]
)
TREES = st.recursive(
    SCALARS | WORDS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(WORDS | st.text(max_size=9), below, max_size=4),
    max_leaves=20,
)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
HEAVY = settings(FEW, max_examples=25)


def answered(act: Callable[[], object]) -> str:
    """What a bad input is told, having seen that nothing but a UserError comes; empty for a sound one."""
    line = ""
    try:
        act()
    except UserError as error:
        line = str(error)
    assert (line or "-").isprintable() and len(line) < 2000
    return line


# --- recipes ---


@FEW
@given(TREES, st.lists(TREES, max_size=3))
def test_any_tree_is_a_recipe_or_one_line(top: Any, stages: list[Any]) -> None:
    answered(lambda: Recipe.from_tree(top, "own"))
    answered(lambda: Recipe.from_tree({"stages": stages}, "own"))


@FEW
@given(stage=WORDS, options=st.dictionaries(WORDS, TREES, max_size=3))
def test_any_options_of_a_stage_are_a_recipe_or_one_line(stage: str, options: dict[str, Any]) -> None:
    answered(lambda: Recipe.from_tree({"stages": [{stage: options}]}, "own"))


@FEW
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | TREES.map(yaml.safe_dump).map(str.encode)
)
def test_any_file_is_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    answered(lambda: Recipe.load(file))


@FEW
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_override_is_taken_or_one_line(key: str, value: str) -> None:
    answered(lambda: parse_value(value))
    answered(lambda: Recipe.load("jsq", [f"{key}={value}", f"prune.sparsity={value}"]))
    answered(lambda: Recipe.load("jsq", [f"quantize.weights={value}"]))


LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "content",
    [LAUGHS + "stages: *a29", "stages: &a [*a]", "[" * 100_000, "- " * 50_000, "stages: [" + "9" * 100_000 + "]",
     "stages: !!python/object/apply:os.system [echo]", "x: " + "y" * (2 << 20)],
    ids=["aliases", "itself", "nesting", "sequences", "digits", "object", "size"],
)  # fmt: skip
def test_yaml_that_grows_or_runs_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert answered(lambda: Recipe.load(tmp_path / "bad.yaml"))
    assert answered(lambda: Recipe.load("jsq", [f"prune.sparsity={content[:5000]}"]))


NINES = "9" * 10_000


@pytest.mark.parametrize("value", ["int" + NINES, "int4-g" + NINES, NINES + ":4", "1e9999", "x" * 10**6])
def test_numbers_without_end_are_one_line(value: str) -> None:
    assert answered(lambda: Recipe.from_tree({"stages": [{"quantize": {"weights": value}}]}, "own"))
    assert answered(lambda: Recipe.from_tree({"stages": [{"prune": {"sparsity": value}}]}, "own"))


@FEW
@given(st.text(), st.text(), st.text())
def test_an_error_is_one_printable_line_whatever_it_is_about(what: str, where: str, fix: str) -> None:
    assert all(c.isprintable() for c in str(UserError(what, where, fix)))


# --- checkpoints ---


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other entries in its config.json."""

    def altered(**config: object) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "altered", dirs_exist_ok=True))
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | config))
        return folder

    return altered


def opened(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(Checkpoint(folder), torch.float32)


CONFIG_KEYS = st.sampled_from(
    [
        "hidden_size",
        "head_dim",
        "model_type",
        "rope_parameters",
        "hidden_act",
        "num_attention_heads",
        "vocab_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "architectures",
        "eos_token_id",
        "max_position_embeddings",
        "tie_word_embeddings",
        "num_hidden_layers",
        "quantization_config",
        "dtype",
    ]
)


@HEAVY
@given(st.dictionaries(CONFIG_KEYS, TREES, max_size=3))
def test_any_config_opens_or_is_one_line(altered: Callable[..., Path], config: dict[str, Any]) -> None:
    answered(lambda: opened(altered(**config)))


@HEAVY
@given(st.dictionaries(CONFIG_KEYS, TREES, max_size=2))
@example({"dtype": 7})
@example({"dtype": None})
def test_any_config_that_opens_is_sampled_from_or_is_one_line(
    altered: Callable[..., Path], config: dict[str, Any]
) -> None:
    def act() -> None:
        folder = altered(**config)
        opened(folder)
        self_samples(folder, [(1, 4, 0)])

    answered(act)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 1e300}, "num_hidden_layers is 1e+300"),
        ({"num_local_experts": 10**9, "model_type": "mixtral"}, "num_local_experts is 1000000000"),
        ({"hidden_size": 10**9}, "cannot build this model"),
        ({"head_dim": 10**12}, "cannot build this model"),
        ({"vocab_size": 10**18}, "cannot build this model"),
        ({"model_type": "gptj", "n_positions": 10**10, "max_position_embeddings": 10**10}, "asks for a tensor"),
    ],
)
def test_absurd_sizes_take_neither_time_nor_memory(
    altered: Callable[..., Path], config: dict[str, object], line: str
) -> None:
    before = peak_memory_bytes("cpu")
    assert line in answered(lambda: opened(altered(**config)))
    after = peak_memory_bytes("cpu")
    assert before is not None and after is not None and after - before < 2**30


def test_what_real_models_ask_for_is_plausible() -> None:
    config = {"num_hidden_layers": 126, "max_window_layers": 28, "n_routed_experts": 256, "rope_theta": 1e11}
    require_plausible(config | {"max_position_embeddings": 10**7, "vocab_size": 256_000, "layer_norm_eps": 1e-5}, 3, "")
    with BoundedFactories(1):
        assert torch.ones(2048, 2048).shape == torch.zeros((2048, 2048)).shape
        assert len(torch.arange(0, 131_072)) == 131_072 and torch.full((2, 3), 1.0).sum() == 6


@pytest.mark.parametrize(
    "act",
    [lambda: torch.ones(10**6, 10**6), lambda: torch.zeros((10**12,)), lambda: torch.full((10**9, 9), 1),
     lambda: torch.arange(10**12), lambda: torch.eye(10**6), lambda: torch.rand(10**10)],
    ids=["ones", "zeros", "full", "arange", "eye", "rand"],
)  # fmt: skip
def test_no_large_tensor_is_filled_while_a_model_is_built(act: Callable[[], object]) -> None:
    with BoundedFactories(1), pytest.raises(ValueError, match="asks for a tensor"):
        act()


HEADERS = [
    {"a": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}},
    {"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"../../a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_claims_what_is_not_there_is_one_line(altered: Callable[..., Path], header: Any) -> None:
    folder = altered()
    content = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + b"\0" * 8)
    assert answered(lambda: opened(folder))


@FEW
@given(
    said=st.integers(0, 2**64 - 1) | st.integers(0, 200),
    content=st.binary(max_size=200) | TREES.map(repr).map(str.encode),
)
def test_any_bytes_are_a_checkpoint_or_one_line(altered: Callable[..., Path], said: int, content: bytes) -> None:
    folder = altered()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", said) + content)
    assert answered(lambda: Checkpoint(folder))


@FEW
@given(st.dictionaries(st.text(max_size=9), st.text(max_size=30) | SCALARS, max_size=4) | TREES)
def test_any_index_stays_in_its_folder_or_is_one_line(altered: Callable[..., Path], weight_map: Any) -> None:
    folder = altered()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert answered(lambda: Checkpoint(folder))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "C:\\x",
        "\\\\host\\x",
        "\0",
        "x" * 256,
    ],
)
def test_a_name_that_leaves_the_folder_is_refused_and_told(
    altered: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    assert not inside(name)
    folder = altered()
    shutil.copy(folder / "model.safetensors", tmp_path / "evil.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "no safetensors file of this folder" in answered(lambda: Checkpoint(folder))
    assert [f for f in inspect(folder).verdict.wrong if f.where == INDEX]


def test_a_link_that_leaves_the_checkpoint_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.model").symlink_to(tmp_path / "secret")
    assert "tokenizer.model: is a link that leaves the folder" in answered(lambda: written(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.model").symlink_to("tokenizer.json")
    written(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_links_of_a_hub_cache_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(checkpoint, snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "4567"
    blob.parent.mkdir()
    (snapshot / "tokenizer.json").rename(blob)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    written(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == blob.read_bytes()


def written(source: Path, output: Path) -> None:
    with CheckpointWriter(output) as writer:
        writer.add({"a": torch.zeros(2)})
        writer.finish({"config.json": "{}"}, source)


# --- nothing runs ---


@pytest.mark.parametrize("model_type", ["own", "llama"])
@pytest.mark.parametrize("command", [["inspect"], ["--dry-run", "--recipe", "wanda-2of4", "--model"]])
def test_code_beside_a_checkpoint_does_not_run_unless_it_is_trusted(
    altered: Callable[..., Path], tmp_path: Path, model_type: str, command: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    marker = tmp_path / "ran"
    own = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    folder = altered(model_type=model_type, auto_map=own)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    code = cli.main([*command, str(folder)])
    assert not marker.exists() and code == (2 if model_type == "own" and command[0] != "inspect" else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_pickles_are_never_opened(altered: Callable[..., Path], tmp_path: Path) -> None:
    folder = altered()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(S'{tmp_path / 'ran'}'\nS'w'\ntR.".encode())
    assert "pickled" in answered(lambda: Checkpoint(folder)) and "pickled" in answered(lambda: inspect(folder))
    assert not (tmp_path / "ran").exists()


# --- calibration ---


@FEW
@given(st.lists(st.binary(max_size=40) | TREES.map(json.dumps).map(str.encode), max_size=4))
def test_any_lines_are_documents_or_one_line(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(b"\n".join(lines))
    answered(lambda: list(jsonl_records(file)))


@pytest.mark.parametrize("line", [b"[" * 100_000, b"9" * 10_000, b'{"text": "\\ud800"', b"\xff\xfe"])
def test_lines_that_no_parser_survives_are_one_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "bad.jsonl").write_bytes(line)
    assert "line 1" in answered(lambda: list(jsonl_records(tmp_path / "bad.jsonl")))
