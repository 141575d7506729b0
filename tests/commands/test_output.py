"""What the program prints: plans, JSON that is nothing but JSON, progress."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures import tiny_folder
from tests.commands.helpers import tree


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
    assert set(plan) == {"steps", "rows", "blocks", "share", "peak_memory_bytes", "size_bytes", "notes"}
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
        "preparing kernels",
        "hashing the model",
        "block 1/2 layers.0",
        "block 2/2 layers.1",
    ]


def test_a_reader_that_has_seen_enough_makes_no_noise(checkpoint: Path) -> None:
    command = [sys.executable, "-c", "import sys; from llmcompress.cli import main; sys.exit(main())", "inspect"]
    with subprocess.Popen([*command, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
