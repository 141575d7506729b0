"""The same command, the same bytes: with one thread or two where the report says so; where not, it says why."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.determinism import determinism, hangs_on_threads
from llmcompress.recipe import Recipe
from tests.architectures import tiny_folder

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from llmcompress import api
source, rows, output, *recipes = sys.argv[1:]
options = api.Options(calibration=rows, samples=4, length=64, evaluate=False, device="cpu")
for recipe in recipes:
    api.compress(source, recipe, f"{output}/{recipe}", options)
"""
SAME = ["jsq", "wanda-smoothquant-2of4"]
OTHER = ["gptq-w4a16", "sparsegpt-2of4"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Hash of the weights by recipe, with one thread and with two; widths at which products are shared out."""
    folder = tmp_path_factory.mktemp("threads")
    source = tiny_folder(folder / "dense", hidden_size=512, intermediate_size=1408, head_dim=128, num_hidden_layers=1)
    rows = torch.randint(3, 96, (4, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, folder / "rows.safetensors")
    hashes = {}
    for threads in (1, 2):
        arguments = [str(source), str(folder / "rows.safetensors"), str(folder / str(threads)), *SAME]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, env=environment, capture_output=True)
        hashes[threads] = {recipe: weights(folder / str(threads) / recipe) for recipe in SAME}
    return hashes


def weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("recipe", SAME)
def test_one_thread_and_two_give_the_same_bytes(recipe: str, found: dict[int, dict[str, str]]) -> None:
    assert found[1][recipe] == found[2][recipe]
    assert "any number of threads" in determinism(Recipe.load(recipe), "cpu", 2)


@pytest.mark.parametrize("recipe", OTHER)
def test_where_threads_may_change_the_bytes_the_report_says_so(recipe: str) -> None:
    assert hangs_on_threads(Recipe.load(recipe))
    line = determinism(Recipe.load(recipe), "cpu", 2)
    assert "with 2 threads" in line and recipe.partition("-")[0] in line
