"""An untouched folder of every recipe passes; every kind of corruption is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress import cli, compress
from llmcompress.api import Options
from llmcompress.inspection.figures import MatrixFigures, outlier_ratio
from llmcompress.inspection.inspect import inspect
from llmcompress.inspection.table import block_rows, matrix_rows
from llmcompress.inspection.table import text as told
from tests.architectures import tiny_folder

UP = "model.layers.1.mlp.up_proj"
#: recipe and what its widths of 32 and 64 need
FAMILIES: dict[str, tuple[str, ...]] = {
    "jsq": (),
    "gptq-w4a16": ("quantize.weights=int4-g16",),
    "sparsegpt-2of4": (),
    "smoothquant-w8a8": (),
    "llm-pruner-20": (),
    "llm-pruner-w8a8": (),
    "omniquant-w4a16": ("quantize.weights=int4-g16",),
    "jsq-plus-w4a8-2of4": ("quantize.weights=int4-g16-mse",),
    "jsq-plus": (),
    "gptq-w3a16": ("quantize.weights=int3-g16",),
    "smoothquant-w6a6": (),
    "fp8-dynamic": (),
    "fp8-static": (),
}
ASYMMETRIC, PER_TENSOR, STATIC = "int8-asym", "int8-tensor", "static inputs"
FURTHER: dict[str, tuple[str, tuple[str, ...]]] = {
    ASYMMETRIC: ("rtn-w8a8", ("quantize.weights=int4-g8-asym",)),
    PER_TENSOR: ("rtn-w8a8", ("quantize.weights=int8-tensor",)),
    STATIC: ("rtn-w8a8", ("quantize.activations=int8-static",)),
}


@pytest.fixture(scope="session")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that a recipe makes of the tiny checkpoint; made once."""
    folders = tmp_path_factory.mktemp("compressed")

    def made(name: str, model: Path = checkpoint, evaluate: bool = False) -> Path:
        recipe, overrides = FURTHER.get(name) or (name, FAMILIES[name])
        folder = folders / f"{model.name}-{name.replace(' ', '-')}-{evaluate}"
        if not folder.exists():
            compress(model, recipe, folder, Options(samples=4, length=16, evaluate=evaluate), overrides=overrides)
        return folder

    return made


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a folder, to be damaged."""
    return lambda name, **how: Path(shutil.copytree(made(name, **how), tmp_path / "copy"))


def shard_of(folder: Path, tensor: str) -> Path:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            if tensor in list(handle.keys()):
                return file
    raise KeyError(tensor)


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    """Rewrites one tensor, and the shard's hash in the record: only the values betray it."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    rehash(folder)


def rehash(folder: Path) -> None:
    from llmcompress.export.checkpoint import sha256

    record = json.loads((folder / "llmcompress.json").read_text())
    record["sha256"] = {name: sha256(folder / name) for name in record["sha256"]}
    (folder / "llmcompress.json").write_text(json.dumps(record))


def change_json(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))


def wrong(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What an inspection finds wrong: where and what, by check."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in inspect(folder).verdict.wrong:
        found.setdefault(finding.check, []).append((finding.where, finding.what))
    return found


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_an_untouched_folder_of_every_recipe_passes(made: Callable[..., Path], name: str) -> None:
    found = inspect(made(name))
    assert not found.verdict.wrong and not [u for u in found.verdict.unchecked if "README" not in u]
    held = found.verdict.held
    assert held["hashes"] == 8 and held["zeros"] == held["bits"] == held["record"] == 14 and held["transformers"]
    quantized = json.loads((made(name) / "config.json").read_text()).get("quantization_config")
    assert held["second opinion"] == (14 if quantized and not name.startswith("fp8") else 0)
    assert held["config"] >= (14 if quantized else 0)
    assert len(found.blocks) == 2 and all(len(groups) == 4 for groups in found.blocks.values())


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "opt", "bloom", "mixtral", "granitemoe"])
def test_other_architectures_pass(made: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    found = inspect(made("jsq", model=tiny_folder(tmp_path / model_type, model_type)))
    assert not found.verdict.wrong
    assert found.verdict.held["masks"] == found.verdict.held["zeros"] > 0


def test_an_evaluated_folder_passes_with_its_card(made: Callable[..., Path]) -> None:
    found = inspect(made("jsq", evaluate=True))
    assert found.holds and found.verdict.held["card"] == 3


# --- corruptions of the weights ---


def test_a_flipped_bit_in_a_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    file = shard_of(folder, f"{UP}.weight")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert wrong(folder)["hashes"] == [(file.name, "is not the file that was written (SHA-256)")]


def revive(weight: Tensor) -> None:
    """The first zero becomes the largest value."""
    flat = weight.view(-1)
    flat[int((flat == 0).nonzero()[0])] = flat.abs().max()


def kill(weight: Tensor) -> None:
    flat = weight.view(-1)
    flat[int(flat.nonzero()[0])] = 0


@pytest.mark.parametrize("name", ["jsq", "sparsegpt-2of4"])
def test_a_zero_that_is_none_any_more_is_found(copied: Callable[..., Path], name: str) -> None:
    folder = copied(name)
    change_tensor(folder, f"{UP}.weight", revive)
    found = wrong(folder)
    assert [where for where, _ in found["zeros"]] == [UP]
    if name == "sparsegpt-2of4":
        ((where, what),) = found["masks"]
        assert where == UP and "1 of 512 groups keep more than 2 of 4" in what and "row 0" in what


def test_a_further_zero_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("sparsegpt-2of4")
    change_tensor(folder, f"{UP}.weight", kill)
    assert wrong(folder) == {"zeros": [(UP, "the record says 1024 zeros, found 1025")]}


def test_a_code_outside_its_grid_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq-plus-w4a8-2of4")  # four bits in a byte
    change_tensor(folder, f"{UP}.weight", lambda codes: codes.view(-1).__setitem__(0, 9))
    ((where, what),) = wrong(folder)["grid"]
    assert where == f"{UP}.weight" and what.endswith("leave the 4-bit grid [-8, 7]")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_one_is_found(copied: Callable[..., Path], value: float) -> None:
    folder = copied("jsq")
    change_tensor(folder, f"{UP}.weight_scale", lambda scale: scale.view(-1).__setitem__(0, value))
    assert wrong(folder)["scales"] == [(f"{UP}.weight_scale", "has scales that are not finite and positive")]


def test_a_changed_scale_is_found_by_the_hash(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    said = (folder / "llmcompress.json").read_text()
    change_tensor(folder, f"{UP}.weight_scale", lambda scale: scale.mul_(2))
    (folder / "llmcompress.json").write_text(said)
    assert list(wrong(folder)) == ["hashes"]


def test_a_weight_that_is_not_finite_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    change_tensor(folder, "model.norm.weight", lambda weight: weight.__setitem__(0, float("nan")))
    assert "model.norm.weight" in dict(wrong(folder)["finite"])


# --- corruptions of the files ---


def test_a_missing_or_cut_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    (folder / "model-00002-of-00003.safetensors").unlink()
    first = folder / "model-00001-of-00003.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    found = inspect(folder)
    assert {(f.where, f.what[:10]) for f in found.verdict.wrong if f.check == "files"} == {
        ("model-00002-of-00003.safetensors", "is missing"), (first.name, "is damaged"),
    }  # fmt: skip
    assert "the tensors: not all shards can be read" in found.verdict.unchecked


LIES: list[tuple[Callable[[Any], object], str, str]] = [
    (lambda i: i["weight_map"].pop("model.norm.weight"), "model.norm.weight", "not in the index"),
    (lambda i: i["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}), "ghost", "no shard holds it"),
    (lambda i: i["weight_map"].update({f"{UP}.weight": "model-00001-of-00003.safetensors"}), f"{UP}.weight", "but it"),
    (lambda i: i["metadata"].update(total_size=1), "model.safetensors.index.json", "says 1 bytes"),
    (lambda i: i["weight_map"].update({"x": "../x.safetensors"}), "model.safetensors.index.json", "leaves the folder"),
    (lambda i: i.update(weight_map=3), "model.safetensors.index.json", "no weight_map"),
]


@pytest.mark.parametrize(("change", "where", "what"), LIES, ids=[what for _, _, what in LIES])
def test_an_index_that_lies_is_found(
    copied: Callable[..., Path], change: Callable[[Any], object], where: str, what: str
) -> None:
    folder = copied("jsq")
    change_json(folder, "model.safetensors.index.json", change)
    assert [said for place, said in wrong(folder)["index"] if place == where and what in said]


def test_a_stray_shard_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq")
    save_file({"stray": torch.ones(1)}, folder / "extra.safetensors")
    found = wrong(folder)
    assert ("extra.safetensors", "is not named by model.safetensors.index.json") in found["index"]


# --- corruptions of what the folder says ---


def weights_of(config: Any) -> Any:
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


CONFIGS: list[tuple[str, Callable[[Any], object], str]] = [
    ("gptq-w4a16", lambda c: weights_of(c).update(num_bits=8), "8-bit codes of 32 × 32 take (32, 8) int32"),
    ("gptq-w4a16", lambda c: weights_of(c).update(group_size=8), "a scale per group of 8 is (32, 4), found (32, 2)"),
    ("jsq", lambda c: weights_of(c).update(num_bits=4), ""),
    ("jsq-plus-w4a8-2of4", lambda c: weights_of(c).update(num_bits=8), "has weights bits=8"),
    (
        "jsq",
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations=None),
        "inputs as they are",
    ),
    ("jsq", lambda c: c["quantization_config"].update(ignore=[]), "is missing"),
    ("jsq", lambda c: c["quantization_config"]["ignore"].append(f"re:{UP}$"), "leaves the matrix dense"),
    ("jsq", lambda c: c.pop("quantization_config"), "leaves the matrix dense"),
]


@pytest.mark.parametrize(("name", "change", "what"), CONFIGS, ids=[f"{n}-{w[:12]}" for n, _, w in CONFIGS])
def test_a_quantization_config_that_does_not_fit_the_tensors_is_found(
    copied: Callable[..., Path], name: str, change: Callable[[Any], object], what: str
) -> None:
    folder = copied(name)
    change_json(folder, "config.json", change)
    assert ("config.json", "is not the file that was written (SHA-256)") in wrong(folder)["hashes"]
    rehash(folder)
    found = wrong(folder)
    assert any(what in said for _, said in [*found.get("config", []), *found.get("grid", [])])


REPORTS: list[Callable[[Any], object]] = [
    lambda r: r.update(effective_bits=4.0),
    lambda r: r.update(sparsity=0.9),
    lambda r: r["size_bytes"].update(after=1),
    lambda r: r.update(recipe="other"),
    lambda r: r.update(seed=7),
    lambda r: r["versions"].update(torch="0"),
    lambda r: r["blocks"][1]["matrices"][0].update(sparsity=0.75),
    lambda r: r["blocks"][1]["matrices"][0].update(bits=2.0),
    lambda r: r["blocks"][1]["matrices"].pop(),
    lambda r: r.pop("blocks"),
]


@pytest.mark.parametrize("change", REPORTS, ids=range(len(REPORTS)))
def test_an_edited_report_is_found(copied: Callable[..., Path], change: Callable[[Any], object]) -> None:
    folder = copied("jsq")
    change_json(folder, "report.json", change)
    assert all("report.json" in where for where, _ in wrong(folder)["report"])


def test_a_perplexity_that_is_not_the_one_of_the_card_is_found(copied: Callable[..., Path]) -> None:
    folder = copied("jsq", evaluate=True)
    change_json(folder, "report.json", lambda r: r["perplexity"].update(after=1.5))
    ((where, what),) = wrong(folder)["card"]
    assert where == "README.md" and what.startswith("gives perplexity") and what.endswith("report.json 1.5")


RECORDS: list[tuple[Callable[[Any], object], str]] = [
    (lambda r: r["matrices"].pop(UP), "record"),
    (lambda r: r["matrices"].update(ghost=r["matrices"][UP]), "record"),
    (lambda r: r["matrices"][UP].update(shape=[3, 4]), "record"),
    (lambda r: r["matrices"][UP].update(zeros=1), "zeros"),
    (lambda r: r["matrices"][UP].update(bits=4), "bits"),
    (lambda r: r["matrices"][UP].clear(), "record"),
    (lambda r: r.update(matrices=3), "record"),
    (lambda r: r.update(pattern="2:4"), "masks"),
    (lambda r: r.update(pattern="0.9"), "recipe"),
    (lambda r: r.update(sha256=3), "record"),
    (lambda r: r.update(recipe={"name": "jsq", "hash": "0"}), "recipe"),
]


@pytest.mark.parametrize(("change", "check"), RECORDS, ids=range(len(RECORDS)))
def test_a_record_that_lies_is_found(copied: Callable[..., Path], change: Callable[[Any], object], check: str) -> None:
    folder = copied("jsq")
    change_json(folder, "llmcompress.json", change)
    assert check in wrong(folder)


# --- folders of other programs ---


def foreign(checkpoint: Path, folder: Path, weights: dict[str, Any], form: str) -> Path:
    """The tiny checkpoint quantized by compressed-tensors itself."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(form)
    found = {}
    for name, value in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = value
            continue
        top = 127.5 if weights["type"] == "int" else 448.0
        state = {"weight": value, "weight_scale": value.abs().amax(1, keepdim=True) / top}
        if not weights["symmetric"]:
            state["weight_zero_point"] = torch.zeros(value.shape[0], 1, dtype=torch.int8)
        stem = name.removesuffix("weight")
        found |= {stem + part: t.contiguous() for part, t in compressor.compress(state, scheme).items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    change_json(folder, "config.json", lambda c: c.update(quantization_config={
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group}, "sparsity_config": {"format": "dense"},
    }))  # fmt: skip
    return folder


ARGUMENTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
FOREIGN = [
    (ARGUMENTS, "int-quantized"),
    (ARGUMENTS, "pack-quantized"),
    ({**ARGUMENTS, "num_bits": 4}, "pack-quantized"),
    ({**ARGUMENTS, "type": "float"}, "float-quantized"),
]


@pytest.mark.parametrize(("weights", "form"), FOREIGN, ids=[f"{f}-{w['num_bits']}" for w, f in FOREIGN])
def test_a_folder_of_another_program_is_verified_as_far_as_it_goes(
    checkpoint: Path, tmp_path: Path, weights: dict[str, Any], form: str
) -> None:
    folder = foreign(checkpoint, tmp_path / "foreign", weights, form)
    found = inspect(folder)
    assert found.compressed and not found.verdict.wrong
    assert found.verdict.held["scales"] == 14 and len(found.matrices) == 16
    assert any("no record" in said for said in found.verdict.unchecked)
    assert any(said.startswith("sparsity_config of") for said in found.verdict.unchecked)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight_scale"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert wrong(folder)["scales"]


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "recipe.yaml", "config.json"])
def test_any_other_file_that_was_changed_is_found(copied: Callable[..., Path], file: str) -> None:
    folder = copied("jsq")
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert wrong(folder) == {"hashes": [(file, "is not the file that was written (SHA-256)")]}


# --- figures and the command ---


def figures(block: int, column_outlier: float = 4.0) -> list[MatrixFigures]:
    names = [f"model.layers.{block}.{kind}" for kind in ("q_proj", "down_proj")]
    return [
        MatrixFigures(n, f"model.layers.{block}", (8, 8), 64, 8.0, "int8", 0.5, 32, 4.0, column_outlier) for n in names
    ]


def test_many_blocks_that_are_alike_are_one_row_and_the_odd_one_stands_alone() -> None:
    rows = block_rows([f for block in range(80) for f in figures(block, 40.0 if block == 33 else 4.0)])
    assert [row[0] for row in rows] == [
        "block", "model.layers.0 … 32 (33 blocks, each)", "model.layers.33",
        "model.layers.34 … 79 (46 blocks, each)", "all",
    ]  # fmt: skip
    assert rows[2][-1] == "q_proj column 40, down_proj column 40" and rows[-1][1] == "160"
    assert len(block_rows([f for block in range(8) for f in figures(block)])) == 10
    assert len(matrix_rows([f for block in range(80) for f in figures(block)])) == 161


def test_the_outlier_ratio_is_the_peak_over_the_root_mean_square() -> None:
    values = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert outlier_ratio(values, 1) == pytest.approx(4 / (12.5**0.5))
    assert outlier_ratio(values, 0) == pytest.approx(2**0.5)
    assert outlier_ratio(torch.zeros(2, 2), 0) == 0


def test_a_planted_outlier_stands_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "outlier"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"][5, 7] = 100 * tensors[f"{UP}.weight"].std()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lines = told(inspect(folder)).splitlines()
    assert [line for line in lines if line.startswith("model.layers.1") and "mlp.up_proj column 8" in line]


def test_the_exit_code_tells_the_verdict(
    copied: Callable[..., Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("jsq")
    assert cli.main(["inspect", str(folder)]) == 0
    assert "everything that was checked holds" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--all"]) == 0
    assert f"{UP} " in capsys.readouterr().out
    assert cli.main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    change_tensor(folder, f"{UP}.weight", kill)
    assert cli.main(["inspect", str(folder)]) == 1
    assert "WRONG" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
