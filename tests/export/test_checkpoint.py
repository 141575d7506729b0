"""A checkpoint folder appears whole or not at all, and never at the cost of what was there before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.runtime.loading import load
from tests.export.written import FILES, contents, write


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).eval()


def test_one_shard_is_the_plain_file_without_an_index(tmp_path):
    write(tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["config.json", "llmcompress.json", "model.safetensors"]


def test_index_names_the_shard_that_holds_each_tensor(tmp_path):
    write(tmp_path / "out", shards=3)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= {name: (shard.name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: shard for name, (shard, _) in held.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in held.values())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_hashes_are_those_of_the_files(tmp_path):
    hashes = write(tmp_path / "out", shards=2)
    assert hashes == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("*.safetensors")
    }


def test_same_tensors_give_same_bytes(tmp_path):
    write(tmp_path / "a", shards=2)
    write(tmp_path / "b", shards=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_call_above_the_limit_is_split_without_losing_a_tensor(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.zeros(100)}
    with CheckpointWriter(tmp_path / "out", shard_bytes=80) as writer:
        writer.add(tensors)
        writer.finish(FILES)
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [list(shard) for shard in shards] == [["t0", "t1"], ["t2", "t3"], ["t4"], ["large"]]
    assert all(torch.equal(tensor, tensors[name]) for shard in shards for name, tensor in shard.items())


def test_what_was_added_is_on_disk_before_the_next_is_written(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        for count in (1, 2, 3):
            writer.add({f"t{count}": torch.zeros(4)})
            before = [load_file(writer.partial / f"shard-{i:05d}.safetensors") for i in range(count - 1)]
            assert [list(tensors) for tensors in before] == [[f"t{i}"] for i in range(1, count)]


def test_what_is_read_in_the_background_keeps_nobody_waiting_before_the_second_that_is_added(tmp_path):
    may_read = threading.Event()

    def read() -> dict[str, torch.Tensor]:
        assert may_read.wait(60)
        return {"a": torch.ones(4)}

    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add_unread(["a"], 16, read)
        assert (writer.number_of_shards, writer.total_bytes, writer.shards) == (1, 16, [])
        with pytest.raises(ValueError, match="tensor a was already written"):
            writer.add({"a": torch.zeros(1)})
        writer.add({"b": torch.zeros(1)})
        assert writer.shards == []
        threading.Timer(0.1, may_read.set).start()
        writer.add({"c": torch.zeros(1)})  # waits for b
        assert [shard.names for shard in writer.shards[:2]] == [["a"], ["b"]]
        writer.finish(FILES)
    assert [list(load_file(file)) for file in sorted((tmp_path / "out").glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_what_cannot_be_read_in_the_background_is_raised_by_the_next_call(tmp_path):
    def read() -> dict[str, torch.Tensor]:
        raise UserError("holds a NaN", "a", "mend it")

    for then in (lambda w: w.add({"b": torch.zeros(1)}), lambda w: w.hashes, lambda w: w.finish(FILES), lambda w: None):
        with pytest.raises(UserError, match="holds a NaN"), CheckpointWriter(tmp_path / "out") as writer:  # noqa: PT012
            writer.add_unread(["a"], 4, read)
            then(writer)
        assert list(tmp_path.iterdir()) == []


def test_what_went_wrong_in_the_background_is_raised_whichever_call_comes_next(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("llmcompress.export.checkpoint.save_file", broken)
    for then in (lambda w: w.add({"b": torch.zeros(1)}), lambda w: w.hashes, lambda w: w.finish(FILES), lambda w: None):
        with pytest.raises(RuntimeError, match="broken"), CheckpointWriter(tmp_path / "out") as writer:  # noqa: PT012
            writer.add({"a": torch.zeros(1)})
            then(writer)
        assert list(tmp_path.iterdir()) == []


def test_views_and_shared_tensors_are_stored_as_their_own_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"rows": whole[:2], "columns": whole.T, "whole": whole, "again": whole}
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tensors)
        writer.finish(FILES)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * (8 + 12 * 3) + 600


def test_a_name_is_written_once(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add({"a": torch.zeros(1)})
        with pytest.raises(ValueError, match="a was already written"):
            writer.add({"a": torch.zeros(1)})


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_as_readable_as_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "out", shards=2)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_kept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = [
        f".out.partial-{os.getppid()}",
        ".out.partial-notes",
        f".other.partial-{gone.pid}",
        f"out.partial-{gone.pid}",
    ]
    for name in [f".out.partial-{gone.pid}", *kept]:
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: ... (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_disk_that_fills_up_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("llmcompress.export.checkpoint.save_file", full)
    with pytest.raises(UserError, match="the disk is full"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add({"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_leaves_nothing(tmp_path, error):
    with pytest.raises(error), CheckpointWriter(tmp_path / "new" / "out") as writer:  # noqa: PT012
        writer.add({"a": torch.zeros(1)})
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_inside_finish_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="missing"), CheckpointWriter(tmp_path / "out") as writer:  # noqa: PT012
        writer.add({"a": torch.zeros(1)})
        writer.finish({"missing/folder.json": ""})
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add({"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_folder_is_readable_but_hidden_until_published(tmp_path, tiny_model):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tiny_model.state_dict())
        with pytest.raises(ValueError, match="follows seal"):
            writer.publish()
        writer.seal({"config.json": tiny_model.config.to_json_string()})
        with pytest.raises(ValueError, match="sealed"):
            writer.add({"late": torch.zeros(1)})
        assert torch.equal(load(writer.partial).lm_head.weight, tiny_model.lm_head.weight)
        assert not (tmp_path / "out").exists()
        writer.publish({"report.json": "{}"})
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "report.json"]


def test_force_replaces_only_at_the_end(tmp_path):
    write(tmp_path / "out", value=1.0)
    before = contents(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", force=True) as writer:
        writer.add({"new": torch.zeros(1)})
        assert contents(tmp_path / "out") == before
        writer.finish(FILES)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", ["body", "rename"])
def test_force_keeps_the_old_folder_when_the_write_fails(tmp_path, monkeypatch, failing):
    write(tmp_path / "out", value=1.0)
    before = contents(tmp_path / "out")
    with pytest.raises(OSError, match="broken"), CheckpointWriter(tmp_path / "out", force=True) as writer:  # noqa: PT012
        writer.add({"new": torch.zeros(1)})
        if failing == "body":
            raise OSError("broken")
        rename = type(tmp_path).rename

        def broken(self, target):
            if self == writer.partial:
                raise OSError("broken")
            return rename(self, target)

        monkeypatch.setattr(type(tmp_path), "rename", broken)
        writer.finish(FILES)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(UserError, match="already exists"), CheckpointWriter(tmp_path / "out") as writer:  # noqa: PT012
        writer.add({"a": torch.zeros(1)})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("kept")
        writer.finish(FILES)
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_dense_folder_loads_to_the_same_logits(tmp_path, tiny_model):
    state, tokens = tiny_model.state_dict(), torch.randint(128, (2, 9))
    blocks = [{n: t for n, t in state.items() if f"layers.{i}." in n} for i in range(2)]
    rest = {n: t for n, t in state.items() if "layers." not in n}
    with CheckpointWriter(tmp_path / "out") as writer:
        for part in [*blocks, rest]:
            writer.add(part)
        writer.finish({"config.json": tiny_model.config.to_json_string()})
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load(tmp_path / "out")):
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, tiny_model(tokens).logits)
    assert load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16


def test_load_names_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"pickle.*pytorch_model\.bin"):
        load(tmp_path)
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unknown dtype"):
        load(tmp_path, dtype="float33")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"model-1\.safetensors: missing"):
        load(tmp_path)
