"""Packed folders come back bit for bit, are smaller by what their zeros took, and nobody mistakes them for a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmcompress.api import compress
from llmcompress.cli import main
from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.export.quantized import Scheme
from llmcompress.export.sparse import PACKED_CONFIG, pack, unpack
from llmcompress.export.zeros import decode, encode, from_nibbles, to_nibbles
from llmcompress.inspection.inspect import inspect
from llmcompress.runtime.loading import load
from tests.export.test_quantized import all_but_head, linears_of, save, tiny_llama


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def block_bytes(folder: Path) -> int:
    """Of the blocks' tensors, packed or not."""
    tensors = load_file(folder / "model.safetensors")
    return sum(t.nbytes for name, t in tensors.items() if ".layers." in name)


def prune(model: torch.nn.Module, pattern: str) -> None:
    for linear in linears_of(model).values():
        W = linear.weight.data
        fours = W.abs().view(W.shape[0], -1, 4)
        if pattern == "2:4":
            W[(fours.argsort(-1).argsort(-1) < 2).view_as(W)] = 0
        else:
            W[W.abs() < W.abs().median()] = 0


@pytest.fixture(params=["50 %", "2:4"])
def pattern(request: pytest.FixtureRequest) -> str:
    return request.param


def folder_of(tmp_path: Path, pattern: str, scheme: Scheme | None, hidden: int = 128) -> Path:
    model = tiny_llama(torch.bfloat16, hidden)
    prune(model, pattern)
    if scheme is None:
        model.save_pretrained(tmp_path / "plain")
    else:
        save(model, all_but_head(model, scheme), tmp_path / "plain")
    (tmp_path / "plain" / "extra").mkdir()
    (tmp_path / "plain" / "extra" / "chat.txt").write_text("kept")
    return tmp_path / "plain"


SCHEMES = {
    "int8": (Scheme(QuantGrid.parse_weights("int8"), QuantGrid.parse_activations("int8")), 0.66, 0.60),
    "int4": (Scheme(QuantGrid.parse_weights("int4-g128")), 0.80, 0.72),
    "bfloat16": (None, 0.60, 0.58),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_folder_comes_back_bit_for_bit_from_fewer_bytes(tmp_path: Path, name: str, pattern: str) -> None:
    scheme, masked, paired = SCHEMES[name]
    plain = folder_of(tmp_path, pattern, scheme)
    size = pack(plain, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(plain)
    assert size["after"] < size["before"]
    ratio = block_bytes(tmp_path / "packed") / block_bytes(plain)
    assert ratio < (masked if pattern == "50 %" else paired)


def test_what_comes_back_loads_in_transformers(tmp_path: Path) -> None:
    plain = folder_of(tmp_path, "2:4", SCHEMES["int8"][0])
    pack(plain, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    tokens = torch.randint(128, (1, 6))
    with torch.no_grad():
        found, expected = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (tmp_path / "back", plain))
    assert torch.equal(found, expected)


def test_no_loader_takes_a_packed_folder_for_a_model(tmp_path: Path) -> None:
    pack(folder_of(tmp_path, "2:4", None), tmp_path / "packed")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for reads in (load, inspect, compress):
        with pytest.raises(UserError, match="unpack it first"):
            reads(tmp_path / "packed")
    with pytest.raises(UserError, match="packed already"):
        pack(tmp_path / "packed", tmp_path / "again")


def test_tensors_of_every_type_and_odd_sizes_come_back(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    odd = torch.randn(7, 5)
    odd[::2] = 0
    odd[1, 1] = -0.0
    tensors = {
        "float": odd, "half": odd.to(torch.float16), "double": odd.double(), "long": odd.long(), "empty": odd[:0],
        "scalar": torch.tensor(0.0), "float8": odd.to(torch.float8_e4m3fn), "bool": odd > 0,
        "a.weight_packed": torch.zeros(3, 1, dtype=torch.int32), "zeros": torch.zeros(50),
    }  # fmt: skip
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt", "note": "é"})
    (plain / "config.json").write_text("{}")
    pack(plain, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(plain)


def test_weights_in_folders_within_travel_as_they_are(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    (plain / "adapter").mkdir(parents=True)
    for name in ("model", "adapter/adapter_model"):
        save_file({"a": torch.zeros(50)}, plain / f"{name}.safetensors")
    (plain / "config.json").write_text("{}")
    pack(plain, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(plain)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    save_file({"a": torch.zeros(50)}, plain / "model.safetensors")
    (plain / "config.json").write_text("{}")
    (plain / "llmcompress.json").write_text("{}")
    pack(plain, packed)
    before, rename = contents(packed), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        pack(plain, packed, force=True)
    assert contents(packed) == before and sorted(p.name for p in tmp_path.iterdir()) == ["packed", "plain"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), max_size=70), st.sampled_from([0, 8]), st.sampled_from([4, 8]))
def test_any_codes_come_back(codes: list[int], zero: int, bits: int) -> None:
    given_codes = np.array(codes, np.uint8)
    coding, where, values = encode(given_codes, zero, bits)
    assert np.array_equal(decode(coding, where, values, len(codes), zero), given_codes)
    assert np.array_equal(to_nibbles(from_nibbles(given_codes))[: len(codes)], given_codes)


def test_two_of_four_takes_pairs_of_two_thirds_of_a_bit() -> None:
    codes = np.tile(np.array([0, 3, 0, 5, 7, 0, 9, 0, 1, 2, 0, 0], np.uint8), 50)
    coding, where, values = encode(codes, 0, 8)
    assert coding == "pairs" and where.size == codes.size // 12 and values.size == codes.size // 2


def test_damage_is_told(tmp_path: Path) -> None:
    pack(folder_of(tmp_path, "50 %", None), tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "sparse.json").read_text())
    file = tmp_path / "packed" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="does not unpack to the bytes"):
        unpack(tmp_path / "packed", tmp_path / "back")
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists() and index["version"] == 1


def test_the_commands_pack_and_unpack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = folder_of(tmp_path, "2:4", None)
    assert main(["pack", str(plain), str(tmp_path / "packed")]) == 0
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(plain)
    assert main(["unpack", str(plain), str(tmp_path / "other")]) == 2
    assert main(["unpack", str(tmp_path / "packed"), str(plain)]) == 2
    assert "is not packed" in capsys.readouterr().err
    assert (tmp_path / "packed" / PACKED_CONFIG).is_file()


def test_a_run_can_end_packed(tmp_path: Path) -> None:
    given = ["--model", "llama", "--recipe", "magnitude-50", "--samples", "1", "--length", "16", "--no-eval"]
    assert main([*given, "--output", str(tmp_path / "packed"), "--pack", "sparse"]) == 0
    assert main([*given, "--output", str(tmp_path / "plain")]) == 0
    unpack(tmp_path / "packed", tmp_path / "back")
    shards = {name for name in contents(tmp_path / "plain") if name.endswith(".safetensors")}
    back, plain = contents(tmp_path / "back"), contents(tmp_path / "plain")
    assert shards and all(back[name] == plain[name] for name in shards)
    assert sum(f.stat().st_size for f in (tmp_path / "packed").glob("*.safetensors")) < sum(
        map(len, (plain[n] for n in shards))
    )


@pytest.mark.parametrize("command", [["pack"], ["pack", "--to", "gptq"], ["unpack"]])
def test_a_folder_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([command[0], str(tmp_path / "none"), str(tmp_path / "out"), *command[1:]]) == 2
    assert "no such folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gptq", "bitsandbytes-nf4"])
def test_a_packed_folder_is_unpacked_before_it_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "sparse.json").write_text("{}")
    assert main(["pack", str(tmp_path / "packed"), str(tmp_path / "out"), "--to", kind]) == 2
    assert "unpack it first" in capsys.readouterr().err and not (tmp_path / "out").exists()
