"""Bad input is one line, exit code 2 and an untouched disk; failures leave nothing; JSON is nothing but JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress import cli
from llmcompress.model.groups import InputGroup
from llmcompress.walk import Walk
from tests.architectures import tiny_folder

ROOT = Path(__file__).resolve().parent.parent
UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, Tensor]


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, hidden or not, and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def run(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the program in `tmp_path` on the tiny checkpoint; gives its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, model: object = checkpoint, calibration: object = text) -> tuple[int, str, str]:
        given = [
            "--model",
            model,
            "--recipe",
            "wanda-2of4",
            "--samples",
            4,
            "--length",
            16,
            "--calibration",
            calibration,
        ]
        code = cli.main([str(a) for a in (*given, *arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    """The one line that a bad input gets, having seen that nothing was written."""

    def refusal(*arguments: object, **given: object) -> str:
        before = tree(tmp_path)
        code, out, err = run(*arguments, **given)
        assert (code, out) == (2, "")
        assert err.startswith("llmcompress: ") and err.endswith("\n") and err.count("\n") == 1
        assert tree(tmp_path) == before
        return err

    return refusal


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other weights, or other entries in its config.json."""

    def altered(change: Callable[[Weights], object] | None = None, **config: object) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "altered"))
        if change:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return altered


RECIPES = [
    (["--recipe", "jsk"], "no recipe 'jsk'; did you mean 'jsq'?"),
    (["--recipe", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
    (["--set", "prun.sparsity=0.5"], "no stage 'prun'; did you mean 'prune'?"),
    (["--set", "prune.sparsty=0.5"], "unknown key 'sparsty'; did you mean 'sparsity'?"),
    (["--set", "prune.method=wandaa"], "no method 'wandaa' for stage prune; did you mean 'wanda'?"),
    (["--set", "propagate=compresed"], "unknown 'compresed'; did you mean 'compressed'?"),
    (["--set", "prune"], "'prune' is not stage.key=value"),
    (["--recipe", "jsq", "--set", "quantize.weights=int9"], "quantize.weights: 9 bits; use 2 to 8"),
    (["--recipe", "jsq", "--set", "quantize.weights={bit: 6}"], "unknown key 'bit'; did you mean 'bits'?"),
    (["--recipe", "jsq", "--set", "smooth.alpha=high"], "smooth.alpha: 'high' is not a number"),
    (["--set", "prune.sparsity=1.0"], "prune.sparsity: 1.0 is outside [0, 1)"),
    (["--set", "prune.sparsity=-0.1"], "prune.sparsity: -0.1 is outside [0, 1)"),
    (["--set", "prune.sparsity=nan"], "prune.sparsity: nan is outside [0, 1)"),
    (["--set", "prune.sparsity=5:4"], "pattern 5:4 does not keep 0 < N < M"),
    (["--set", "prune.sparsity=3:5"], "q_proj: pattern 3:5 does not divide 32 input columns; use an M of 2, 4, 8"),
    (
        ["--recipe", "rtn-w8a8", "--set", "quantize.weights=int4-g24"],
        "layers.0.self_attn.q_proj: group size 24 does not divide 32 input columns; use one of 8, 16, 32",
    ),
    (["--set", "targets.include=[nothing]"], "no matrix is targeted"),
]
OPTIONS = [
    (["--recipee", "jsq"], "unrecognized arguments: --recipee jsq"),
    (["compress"], "unrecognized arguments: compress"),
    (["--samples", "0"], "--samples: 0 rows"),
    (["--samples", "many"], "--samples: invalid int value"),
    (["--length", "1"], "--length: rows of 1 tokens"),
    (["--length", "65"], "more than the model's 64 positions; use at most 64"),
    (["--seed", "-1"], "seed -1 is negative"),
    (["--device", "tpu"], "--device: invalid choice"),
    (["--no-eval", "--eval-text", "words.txt"], "not allowed with argument"),
    (["--samples", "100"], "600 tokens, but 100 rows of 16 need 1600; give a longer text or --samples 37"),
    (["--eval-text", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--output", ""], "already exists"),
]


@pytest.mark.parametrize(("arguments", "line"), RECIPES + OPTIONS, ids=lambda value: value[-1] or "empty")
def test_a_mistake_is_one_line_that_names_it(refusal: Callable[..., str], arguments: list[str], line: str) -> None:
    assert line in refusal(*arguments)


def test_a_mistake_in_a_recipe_file_names_the_file(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("stages: [a: b: c")
    assert "own.yaml: not readable as YAML" in refusal("--recipe", "own.yaml")
    (tmp_path / "own.yaml").write_text("stages: [prne]")
    assert "recipe own: unknown stage 'prne'; did you mean 'prune'?" in refusal("--recipe", "own.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused(refusal: Callable[..., str]) -> None:
    assert "no CUDA device is available; use --device cpu" in refusal("--device", "cuda")


def test_no_model_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "arguments are required: --model" in capsys.readouterr().err


def test_an_existing_output_is_refused_before_the_model_is_looked_for(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for extra in ([], ["--dry-run"]):
        assert "out: already exists; choose another --output" in refusal("--output", "out", *extra, model="no/model")
    (tmp_path / "out" / "mine.txt").touch()
    assert "is not an output of this program" in refusal("--output", "out", "--force")


def test_the_model_itself_is_never_the_output(refusal: Callable[..., str], altered: Callable[..., Path]) -> None:
    folder = altered()
    (folder / "llmcompress.json").write_text("{}")  # as if this program had made it
    assert "would overwrite the input model" in refusal("--output", folder, "--force", model=folder)


# --- what is no checkpoint ---


def test_folders_that_hold_no_model_are_refused(
    refusal: Callable[..., str], altered: Callable[..., Path], tmp_path: Path
) -> None:
    assert "nowhere: neither a preset, a folder nor a Hub id" in refusal(model="nowhere")
    assert "lama: neither" in (line := refusal(model="lama")) and "did you mean 'llama'?" in line
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json" in refusal(model=tmp_path / "empty")
    folder = altered()
    (folder / "model.safetensors").unlink()
    assert "altered: no weights (*.safetensors)" in refusal(model=folder)
    (folder / "pytorch_model.bin").touch()
    assert "pickled (pytorch_model.bin)" in (line := refusal(model=folder)) and "only safetensors is read" in line
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "the index names model-1.safetensors, which is not there" in refusal(model=folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refusal(model=folder)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b + b"0"],
    ids=["truncated", "header cut", "empty", "garbage", "overlong"],
)
def test_a_damaged_file_is_named(
    refusal: Callable[..., str], altered: Callable[..., Path], damage: Callable[[bytes], bytes]
) -> None:
    file = altered() / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file}: damaged or truncated safetensors file" in refusal(model=file.parent)


def put(value: float, name: str = UP) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1).__setitem__(3, value)


@pytest.mark.parametrize("calibration", ["self", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    run: Callable[..., tuple[int, str, str]],
    refusal: Callable[..., str],
    altered: Callable[..., Path],
    text: Path,
    value: float,
    calibration: str | None,
) -> None:
    folder = altered(put(value))
    assert UP in refusal("--json", model=folder, calibration=calibration or text)


@pytest.mark.parametrize("calibration", ["self", None])
def test_infinite_activations_name_the_matrix(
    refusal: Callable[..., str], altered: Callable[..., Path], text: Path, calibration: str | None
) -> None:
    folder = altered(lambda weights: weights[UP].fill_(3e38))
    line = refusal("--json", model=folder, calibration=calibration or text)
    assert "NaN or infinite activations" in line and "model.layers.1.mlp." in line


CHECKPOINTS: list[tuple[Callable[[Weights], object] | None, dict[str, object], str]] = [
    (lambda w: w.pop(UP), {}, f"{UP}: the checkpoint lacks this weight"),
    (lambda w: w.pop("model.norm.weight"), {}, "model.norm.weight: the checkpoint lacks this weight"),
    (lambda w: w.update({UP: torch.zeros(3, 32)}), {}, f"{UP}: has the shape (3, 32), config.json says (64, 32)"),
    (lambda w: w.update({UP: w[UP].to(torch.int8)}), {}, f"{UP}: stored as torch.int8"),
    (None, {"model_type": "lama"}, "transformers cannot build this model"),
    (None, {"num_hidden_layers": 0}, "no repeated blocks"),
    (None, {"quantization_config": {"quant_method": "gptq"}}, "is quantized already; give the dense checkpoint"),
]


@pytest.mark.parametrize(("change", "config", "line"), CHECKPOINTS, ids=[line[-30:] for *_, line in CHECKPOINTS])
@pytest.mark.parametrize("calibration", ["self"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_calibration(
    refusal: Callable[..., str],
    altered: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Weights], object] | None,
    config: dict[str, object],
    line: str,
    calibration: str,
) -> None:
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)  # is not reached
    assert line in refusal(model=altered(change, **config), calibration=calibration)


# --- what is no calibration ---


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


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the package."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# --- what fails on the way ---


def test_too_small_a_disk_is_refused_before_calibration(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)  # is not reached
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "of disk space are free" in refusal()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The third shard, the second block's, cannot be written."""
    from llmcompress.export import checkpoint as module

    calls: list[object] = []

    def save(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        save_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_file", save)


GOES_ON = "1 finished block kept, the same command with --resume goes on"


def test_a_disk_that_fills_up_is_one_line_and_leaves_what_resume_goes_on_with(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as full:
        failing(full, OSError(errno.ENOSPC, "No space left on device"))
        code, out, err = run("--json", "--no-eval", "--output", "out")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "out: the disk is full; free some space" in err and GOES_ON in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run("--json", "--no-eval", "--output", "out", "--resume")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_says_how_it_goes_on(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    code, out, err = run("--json", "--no-eval", "--output", "out")
    assert (code, out, err) == (130, "", f"llmcompress: interrupted, {GOES_ON}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_run_that_is_interrupted_before_it_calibrates_leaves_nothing(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcompress.run.draw_tokens", interrupted)
    code, out, err = run("--json", "--no-eval")
    assert (code, out, err) == (130, "", "llmcompress: interrupted, nothing was written\n")
    assert not tree(tmp_path)


def test_an_internal_failure_keeps_the_finished_blocks(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = Walk._serve

    def broken(walk: Walk, group: InputGroup, *rest: Any) -> Any:
        if group.name == "model.layers.1.mlp.down_proj":
            raise RuntimeError("a bug")
        return serve(walk, group, *rest)

    monkeypatch.setattr(Walk, "_serve", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--output", "new/out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.partial"]
    assert [path.name for path in (tmp_path / "new" / "out.partial" / "blocks").iterdir()] == ["00000.json"]


def test_an_internal_failure_exits_with_one_and_a_traceback(tmp_path: Path) -> None:
    script = """
import runpy
from llmcompress.commands import compress
compress.run = lambda arguments: 1 / 0
runpy.run_module("llmcompress", run_name="__main__")
"""
    done = python(script, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


# --- what is printed ---


def test_a_dry_run_tells_the_plan_and_writes_nothing(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run("--dry-run", "--recipe", "jsq", "--set", 'targets.exclude=["*.v_proj"]')
    assert (code, err) == (0, "") and not tree(tmp_path)
    assert "model.layers.0 … model.layers.1 (2 blocks)" in out
    for line in ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj (left dense)", "mlp.gate_proj, mlp.up_proj"]:
        assert f"{line} " in out and "into LlamaRMSNorm" in out
    assert out.count("refused: ") == 2  # o_proj and down_proj read what no norm writes
    assert "compressed   " in out and "GiB at the peak" in out and "on disk" in out


def test_a_dry_run_in_json_is_json(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run("--dry-run", "--json", "--set", 'targets.exclude=["*.v_proj"]')
    assert (code, err) == (0, "") and not tree(tmp_path)
    plan = json.loads(out)
    assert set(plan) == {"blocks", "share", "peak_memory_bytes", "size_bytes", "notes"}
    assert [len(groups) for groups in plan["blocks"].values()] == [4, 4]
    sizes = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "mlp": 3 * 32 * 64, "norms": 64}
    assert plan["share"] == pytest.approx(1 - (sizes["v"] + sizes["norms"]) / sum(sizes.values()))
    assert plan["size_bytes"]["before"] == plan["size_bytes"]["after"] > 0


def test_a_dry_run_says_what_will_be_stored_otherwise_than_asked(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    asymmetric = ["--set", "quantize.weights=int4-g8-asym"]
    assert "note: 4-bit weights of this scheme take 8 bits" in run("--dry-run", "--recipe", "rtn-w8a8", *asymmetric)[1]
    transposed = tiny_folder(tmp_path / "dense", "gpt2")
    assert "not Conv1D" in run("--dry-run", "--recipe", "jsq", model=transposed)[1]
    assert "note: " not in run("--dry-run", "--recipe", "jsq")[1]


def test_the_plan_predicts_the_bytes_on_disk(run: Callable[..., tuple[int, str, str]]) -> None:
    recipe = ["--recipe", "rtn-w8a8", "--no-eval", "--json"]
    predicted = json.loads(run(*recipe, "--dry-run")[1])["size_bytes"]
    found = json.loads(run(*recipe)[1])["size_bytes"]
    assert predicted["before"] == found["before"]
    assert predicted["after"] == pytest.approx(found["after"], rel=0.02)


def test_json_prints_only_the_report_and_force_replaces_only_an_earlier_output(
    run: Callable[..., tuple[int, str, str]], refusal: Callable[..., str], tmp_path: Path
) -> None:
    code, out, err = run("--json", "--no-eval")
    assert (code, err) == (0, "")
    folder = tmp_path / "compressed" / "tiny-wanda-2of4"
    assert json.loads(out) == json.loads((folder / "report.json").read_text())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "already exists" in refusal("--no-eval")
    code, out, _ = run("--no-eval", "--force", "--set", "prune.sparsity=4:8")
    assert code == 0 and f"written to compressed/{folder.name}" in out
    assert json.loads((folder / "llmcompress.json").read_text())["pattern"] == "4:8"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_progress_goes_to_standard_error_one_line_per_block(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--no-eval")
    assert code == 0 and "matrices" in out
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "hashing the model",
        "preparing kernels",
        "block 1/2 layers.0",
        "block 2/2 layers.1",
    ]
