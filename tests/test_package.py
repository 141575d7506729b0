"""The wheel is the same program: built, installed into an empty folder, and run from outside the checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = {
    "torch", "transformers", "accelerate", "datasets", "safetensors", "compressed-tensors",
    "numba", "llvmlite", "greenlet", "scipy", "pyyaml", "tqdm", "matplotlib", "jinja2",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package alone; the libraries come from the environment."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, "--target", str(folder), str(wheel)], folder)
    return folder


def run(command: list[str], folder: Path, site: Path | None = None) -> str:
    """Standard output of a command, run in ``folder`` without a network."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        inner = next(n for n in archive.namelist() if re.search(rf"\.dist-info/(licenses/)?{name}$", n))
        return archive.read(inner).decode()


def test_the_wheel_carries_every_recipe_and_the_checkpoint_byte_for_byte(wheel: Path) -> None:
    data = ROOT / "llmcompress" / "data"
    expected = {f"llmcompress/configs/{p.name}": p for p in (ROOT / "configs").glob("*.yaml")}
    expected |= {f"llmcompress/eval/{p.name}": p for p in (ROOT / "eval").iterdir() if p.is_file()}
    templates = ROOT / "llmcompress" / "pages" / "templates"
    expected |= {p.relative_to(ROOT).as_posix(): p for d in (data, templates) for p in d.rglob("*") if p.is_file()}
    assert "llmcompress/configs/models.yaml" in expected
    assert "llmcompress/eval/blimp_local.yaml" in expected
    assert "llmcompress/data/tiny-llama/model.safetensors" in expected
    with zipfile.ZipFile(wheel) as archive:
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_the_wheel_carries_the_program_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmcompress").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules
    beside = ("llmcompress/configs/", "llmcompress/data/", "llmcompress/eval/", "llmcompress/pages/templates/")
    assert all(n.startswith(beside) for n in names - modules)


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    assert metadata(wheel, "LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_wheel_declares_its_dependencies_and_extras(wheel: Path) -> None:
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    names = {
        re.split(r"[^\w-]", line)[0].lower() for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert names >= DEPENDENCIES
    assert {"eval", "bitsandbytes", "bench", "test", "all"} <= set(fields.get_all("Provides-Extra", []))


def test_the_installed_program_explains_itself(site: Path, tmp_path: Path) -> None:
    out = run([sys.executable, "-m", "llmcompress", "--help"], tmp_path, site)
    assert "--recipe" in out
    assert "--model" in out


def test_the_installed_program_has_the_recipes_presets_and_checkpoint_of_the_checkout(
    site: Path, tmp_path: Path
) -> None:
    script = """
import json, llmcompress
from llmcompress import Recipe, resources
names = Recipe.names()
for name in names:
    Recipe.load(name)
print(json.dumps([llmcompress.__file__, names, {k: v.location for k, v in resources.model_presets().items()}]))
"""
    here, there = (json.loads(run([sys.executable, "-c", script], tmp_path, root)) for root in (ROOT, site))
    assert Path(there[0]).is_relative_to(site)
    assert here[1] == there[1] != []
    assert Path(there[2].pop("llama")) == site / "llmcompress" / "data" / "tiny-llama"
    here[2].pop("llama")
    assert here[2] == there[2]


def test_the_installed_program_compresses_its_own_model(site: Path, tmp_path: Path) -> None:
    command = ["--model", "llama", "--recipe", "rtn-w8a8", "--samples", "4", "--length", "64", "--no-eval", "--json"]
    out = run([sys.executable, "-m", "llmcompress", *command, "--output", "small"], tmp_path, site)
    assert json.loads(out)["recipe"]
    assert (tmp_path / "small" / "config.json").is_file()
    assert (tmp_path / "small" / "report.json").is_file()
