"""Who may import whom. The rooms stay apart: only walk.py joins what is known about networks with the methods."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmcompress

PACKAGE = Path(llmcompress.__file__).parent
HUGGING_FACE = {"transformers", "tokenizers", "datasets", "accelerate", "safetensors", "compressed_tensors"}
HUGGING_FACE |= {"huggingface_hub", "evaluate"}
JOINERS = {"llmcompress.walk", "llmcompress.vision.walk"}


def modules(room: str = "") -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of a room, or of the package."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str, module: str) -> set[str]:
    """Dotted names that a module's source imports anywhere: at the top, in functions, for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def own(names: set[str]) -> set[str]:
    """Those of the project, less the package itself, which `from llmcompress import x` names too."""
    return {name for name in names if name.startswith("llmcompress.")}


def test_an_import_is_seen_wherever_it_stands() -> None:
    source = "def f():\n    import transformers.utils\n    from ..model import fold\n    from . import walk"
    found = imports(source, "llmcompress.core.grid")
    assert {"transformers.utils", "llmcompress.model", "llmcompress.model.fold", "llmcompress.core.walk"} <= found


def test_core_imports_nothing_but_tensors() -> None:
    third_parties = {"torch", "triton", "numba", "llvmlite", "numpy", "scipy", "llmcompress"}
    for module, path in modules("core"):
        names = imports(path.read_text(encoding="utf-8"), module)
        strangers = {name.split(".")[0] for name in names} - third_parties - set(sys.stdlib_module_names)
        assert not strangers, f"{module} imports {strangers}"
        strangers = {n for n in own(names) if not inside(n, "llmcompress.core", "llmcompress.errors")}
        assert not strangers, f"{module} imports {strangers}"


def test_core_runs_without_hugging_face() -> None:
    names = [module for module, _ in modules("core")]
    script = f"""
import importlib, sys
for name in {names}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # triton exists only beside CUDA builds of torch
        if error.name.split(".")[0] != "triton": raise
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {HUGGING_FACE}))
"""
    assert run_python(script) == ""


def test_methods_import_only_core() -> None:
    for module, path in modules("methods"):
        names = imports(path.read_text(encoding="utf-8"), module)
        allowed = ("llmcompress.core", "llmcompress.errors", "llmcompress.methods")
        strangers = {n for n in own(names) if not inside(n, *allowed)}
        strangers |= {name.split(".")[0] for name in names} & HUGGING_FACE
        assert not strangers, f"{module} imports {strangers}"


def test_model_imports_no_method() -> None:
    for module, path in modules("model"):
        names = imports(path.read_text(encoding="utf-8"), module)
        assert not {n for n in names if inside(n, "llmcompress.methods", "llmcompress.walk")}, module


def test_only_the_walk_joins_networks_and_methods() -> None:
    joiners = set()
    for module, path in modules():
        names = imports(path.read_text(encoding="utf-8"), module)
        methods = any(inside(n, "llmcompress.methods", "llmcompress.core.group.run_methods") for n in names)
        if methods and any(inside(n, "llmcompress.model") for n in names):
            joiners.add(module)
    assert joiners <= JOINERS


@pytest.mark.parametrize("name", ["compress", "load", "Recipe"])
def test_the_package_offers(name: str) -> None:
    assert callable(getattr(llmcompress, name))


def test_no_offered_name_is_that_of_a_module() -> None:
    """Importing the module would replace the function."""
    taken = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not taken & set(llmcompress.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        llmcompress.compres  # noqa: B018


def test_importing_the_package_imports_no_library() -> None:
    assert run_python("import llmcompress, sys; print(*({'torch', 'numpy', 'transformers'} & set(sys.modules)))") == ""


def test_help_does_not_wait_for_hugging_face() -> None:
    script = """
import sys
from llmcompress.cli import main
try:
    code = main(["--help"])
except SystemExit as end:
    code = end.code
assert not code
print("loaded", *sorted({"transformers", "datasets", "compressed_tensors"} & set(sys.modules)))
"""
    assert run_python(script).splitlines()[-1] == "loaded"


def run_python(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
