"""Models made by `load` compute what transformers computes of the same folder, and hold the stored tensors."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress import api
from llmcompress.cli import main
from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import rounded_activations
from llmcompress.export.quantized import Scheme
from llmcompress.measure import release_file_pages, release_mapped
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.runtime.bench_worker import resident_bytes
from llmcompress.runtime.int4 import W4A16Linear
from llmcompress.runtime.int8 import W8A8Linear
from llmcompress.runtime.loading import load, runtime_of
from tests.architectures import tiny_folder
from tests.export.test_quantized import all_but_head, linears_of, save, tiny_llama

W, A = QuantGrid.parse_weights, QuantGrid.parse_activations
W8A8, W4A16, ASYMMETRIC = Scheme(W("int8"), A("int8")), Scheme(W("int4-g32")), Scheme(W("int8-asym"), A("int8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    base = tmp_path_factory.mktemp("folders")
    for name, scheme in (("w8a8", W8A8), ("w4a16", W4A16), ("asymmetric", ASYMMETRIC)):
        model = tiny_llama(torch.float32)
        save(model, all_but_head(model, scheme), base / name)
        made[name] = base / name
    model = tiny_llama(torch.float32)
    names = [name for name in linears_of(model) if name != "lm_head"]
    save(model, {name: ASYMMETRIC if "down" in name else W8A8 for name in names}, base / "mixed")
    tiny_llama(torch.float32).save_pretrained(base / "dense")
    return made | {"mixed": base / "mixed", "dense": base / "dense"}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits.float()


@pytest.mark.parametrize(("name", "bound"), [("w8a8", 0.02), ("w4a16", 0.02), ("mixed", 0.02)])
@pytest.mark.filterwarnings("ignore:.*quantized matrices dense")
def test_logits_are_those_of_transformers(
    folders: dict[str, Path], tokens: torch.Tensor, name: str, bound: float
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folders[name]), tokens)
    found = logits(load(folders[name]), tokens)
    assert (found - expected).norm() < bound * expected.norm()


def test_packed_weights_lose_no_more_than_bfloat16_does(folders: dict[str, Path], tokens: torch.Tensor) -> None:
    exact = logits(AutoModelForCausalLM.from_pretrained(folders["w4a16"]), tokens)
    plain = logits(AutoModelForCausalLM.from_pretrained(folders["w4a16"], dtype=torch.bfloat16), tokens)
    found = logits(load(folders["w4a16"], dtype=torch.bfloat16), tokens)
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()


def test_linears_hold_the_stored_tensors(folders: dict[str, Path]) -> None:
    for name, kind, kernel in (("w8a8", W8A8Linear, "int8"), ("w4a16", W4A16Linear, "int4")):
        model = load(folders[name])
        held = [module for module in model.modules() if isinstance(module, kind)]
        assert len(held) == 14 and runtime_of(model).kernels == {kernel: 14}
        assert not [n for n, _ in model.named_parameters() if n.endswith("proj.weight")]


def test_generation_with_a_cache_is_generation_without_one(folders: dict[str, Path], tokens: torch.Tensor) -> None:
    model = load(folders["w8a8"])
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **given), model.generate(tokens, **given, use_cache=False))


def test_rows_of_a_batch_do_not_touch_each_other(folders: dict[str, Path], tokens: torch.Tensor) -> None:
    model = load(folders["w8a8"])
    alone = torch.cat([logits(model, row[None]) for row in tokens])
    assert torch.allclose(logits(model, tokens), alone, atol=1e-4)


def test_what_stays_dense_is_said(folders: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="2 quantized matrices dense: its weights are asymmetric"):
        model = load(folders["mixed"])
    assert runtime_of(model).kernels == {"int8": 12, "dense": 2}
    with pytest.warns(UserWarning, match="14 quantized matrices dense"):
        load(folders["asymmetric"])


@pytest.fixture
def rows(tmp_path: Path) -> api.Options:
    save_file({"input_ids": torch.randint(3, 90, (2, 16))}, tmp_path / "rows.safetensors")
    return api.Options(calibration=str(tmp_path / "rows.safetensors"), samples=2, length=16, evaluate=False)


@pytest.mark.parametrize("name", ["opt", "gemma", "falcon_mamba", "mixtral"])
def test_other_architectures_multiply_in_integers_too(tmp_path: Path, rows: api.Options, name: str) -> None:
    """Against the blockwise model, which simulates the folder; transformers cannot load experts in int8."""
    api.compress(tiny_folder(tmp_path / "dense", name), "rtn-w8a8", tmp_path / "out", rows)
    model, tokens = load(tmp_path / "out"), torch.randint(3, 90, (2, 12))
    assert set(runtime_of(model).kernels) == {"int8"}
    simulated = BlockwiseModel(Checkpoint(tmp_path / "out"), torch.float32)
    for index in range(len(simulated.blocks)):
        simulated.load_block(index)
    simulated.load_rest(head=True)
    with rounded_activations(simulated):
        expected = logits(simulated.model, tokens)
    assert (logits(model, tokens) - expected).norm() < 0.02 * expected.norm()


def test_code_that_reads_weights_itself_is_left_to_transformers(tmp_path: Path, rows: api.Options) -> None:
    api.compress(tiny_folder(tmp_path / "dense", "rwkv"), "rtn-w8a8", tmp_path / "out", rows)
    with pytest.warns(UserWarning, match="all dense: its code reads the weights themselves"):
        load(tmp_path / "out")
    with pytest.raises(UserError, match="reads the weights"):
        load(tmp_path / "out", runtime="int8")


def test_dense_folders_and_dense_runtimes_say_nothing(folders: dict[str, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert runtime_of(load(folders["dense"])).kernels == {}
        assert runtime_of(load(folders["w8a8"], runtime="dense")).kernels == {}


@pytest.mark.parametrize(("name", "runtime"), [("w8a8", "int4"), ("w4a16", "int8"), ("dense", "int8"), ("w8a8", "fp8")])
def test_a_runtime_that_cannot_be_had_is_refused(folders: dict[str, Path], name: str, runtime: str) -> None:
    with pytest.raises(UserError, match=r"nothing in it can be multiplied|unknown runtime"):
        load(folders[name], runtime=runtime)


def test_a_dtype_is_that_of_what_stays_floating(folders: dict[str, Path], tokens: torch.Tensor) -> None:
    model = load(folders["w8a8"], dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model(tokens).logits.dtype == torch.bfloat16


def test_bench_measures_the_folder_and_the_dense_model(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    given = [
        "--prompt",
        "8",
        "--new",
        "2",
        "--batch",
        "1,2",
        "--rounds",
        "1",
        "--dense",
        "float32",
        "--json",
        str(file),
    ]
    assert main(["bench", str(folders["w8a8"]), "--against", str(folders["dense"]), *given]) == 0
    found = json.loads(file.read_text())
    assert [v["name"] for v in found["variants"]] == ["w8a8", "dense float32"]
    assert found["variants"][0]["kernels"] == "14 matrices in int8"
    for variant in found["variants"]:
        assert variant["resident_bytes"] > variant["model_bytes"]
        rates = variant["batches"]["2"]["decode_tokens_per_second"]
        assert 0 < rates["low"] <= rates["median"] <= rates["high"]
    assert found["tokens_per_second"]["decode"]["after"] > 0


def test_bench_refuses_what_cannot_run(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folders["w8a8"]), "--runtime", "int4", "--rounds", "1"]) == 2
    assert "nothing in it can be multiplied in int4" in capsys.readouterr().err
    assert main(["bench", str(folders["w8a8"] / "none")]) == 2
    capsys.readouterr()
    assert main(["bench", str(folders["w8a8"]), "--prompt", "100000", "--rounds", "1"]) == 2
    assert "more than the model's" in capsys.readouterr().err


def test_bench_prints_json_alone(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--prompt", "8", "--new", "2", "--batch", "1", "--rounds", "1", "--json", "-"]
    assert main(["bench", str(folders["dense"]), *small]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == 2


def test_generate_goes_no_further_than_the_model_has_positions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "llama", "--prompt", "It was", "--new", "2048"]) == 2
    captured = capsys.readouterr()
    assert "more than the model's 2048 positions" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["bench", "--batch", "1,x"], "--batch: 'x' is no whole number from 1 on"),
        (["bench", "--prompt", "0"], "--prompt: '0' is no whole number from 1 on"),
        (["bench", "--dense", "fp16"], "--dense: 'fp16' is neither float32 nor bfloat16"),
        (["bench", "--json", "none/speeds.json"], "--json none/speeds.json: its folder does not exist"),
        (["bench", "--against", "none"], "--against none: neither a preset, a folder nor a Hub id"),
        (["generate", "--prompt", "It", "--new", "0"], "--new: '0' is no whole number from 1 on"),
    ],
)
def test_a_wrong_option_is_told_by_its_own_name_before_anything_runs(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], given: list[str], line: str
) -> None:
    assert main([given[0], str(folders["w8a8"]), *given[1:]]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_device_that_is_absent_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        load(folders["w8a8"], device="cuda")
    assert main(["generate", str(folders["w8a8"]), "--prompt", "It", "--device", "cuda"]) == 2


def test_generate_streams_the_same_text_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def text() -> str:
        assert main(["generate", "llama", "--prompt", "It was a dark", "--new", "8", "--temperature", "1"]) == 0
        return capsys.readouterr().out

    first = text()
    assert first.startswith("It was a dark") and len(first.split()) > 5 and first == text()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the system does not tell")
def test_rows_looked_up_leave_memory_and_come_back_the_same(tmp_path: Path) -> None:
    save_file({"table": torch.arange(1 << 20, dtype=torch.float32).view(-1, 16)}, tmp_path / "table.safetensors")
    with safe_open(tmp_path / "table.safetensors", framework="pt") as handle:
        mapped = handle.get_tensor("table")
    total = float(mapped.double().sum())
    full = resident_bytes()
    release_mapped(mapped)
    assert full - resident_bytes() > mapped.nbytes / 2
    assert float(mapped.double().sum()) == total


def test_what_a_model_computes_is_the_same_after_its_file_pages_were_released(
    folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    model = load(folders["w8a8"])
    before = logits(model, tokens)
    release_file_pages()
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("name", ["dense", "w4a16"])
def test_running_in_floating_point_brings_no_compiler_into_the_process(folders: dict[str, Path], name: str) -> None:
    code = f"""
import sys, torch, llmcompress
llmcompress.load({str(folders[name])!r})(torch.zeros(1, 64, dtype=torch.int64))
sys.exit("numba" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
