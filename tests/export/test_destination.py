"""Where a result may be written is settled before any work; the files that travel with it are those it needs."""

from __future__ import annotations

import shutil

import pytest
import torch

from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.companions import REMOTE_CODE
from llmcompress.export.destination import check_disk_space, check_output
from tests.export.written import FILES, contents, write


def test_existing_output_is_refused_before_any_work(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(UserError, match=r"already exists.*--force"):
        check_output(tmp_path / "out")
    check_output(tmp_path / "out", force=True)


def test_force_refuses_what_is_not_ours(tmp_path):
    for name in ("folder", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    write(tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for name in ("folder", "checkpoint", "file", "link"):
        with pytest.raises(UserError, match="not an output of this program"):
            check_output(tmp_path / name, force=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=True)


def test_the_input_model_and_its_parents_are_never_replaced(tmp_path, monkeypatch):
    model = tmp_path / "models" / "llama"
    write(model)
    monkeypatch.chdir(tmp_path)
    for output in (model, tmp_path / "models", tmp_path / "models" / ".." / "models" / "llama"):
        with pytest.raises(UserError, match="input model"):
            check_output(output, force=True, source=model)
    check_output(model.parent / "llama-small", force=True, source=model)


def test_a_parent_that_cannot_hold_folders_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        check_output(tmp_path / "file" / "out")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="permission"):
        check_output(tmp_path / "deep" / "out")


def test_disk_space_is_refused_above_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"of disk space"):
        check_disk_space(tmp_path / "not" / "yet", free * 2)


def test_tokenizer_files_travel_and_weights_do_not(tmp_path):
    source = tmp_path / "snapshots" / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    carried = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "LICENSE"]
    carried += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"]
    carried += ["additional_chat_templates/tool.jinja"]
    left = ["pytorch_model.bin", "model.safetensors", "tokenizer.pt", "config.json", "README.md", "llmcompress.json"]
    for name in [*carried, *left, "modeling_own.py"]:
        (source / name).write_text(name)
    (source / "tokenizer.json").unlink()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_text("tokenizer.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "blobs" / "0123")  # as in the hub's cache
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add({"a": torch.zeros(1)})
        writer.finish(FILES | {"generation_config.json": "ours"}, source)
    written = contents(tmp_path / "out")
    assert sorted(written) == sorted([*carried, *FILES, "model.safetensors"])
    assert written["generation_config.json"] == b"ours"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    with CheckpointWriter(tmp_path / "code") as writer:
        writer.add({"a": torch.zeros(1)})
        writer.finish(FILES, source, REMOTE_CODE)
    assert "modeling_own.py" in contents(tmp_path / "code")
