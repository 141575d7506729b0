"""What every file of the package owes its reader."""

from __future__ import annotations

import ast
from pathlib import Path

import llmcompress

FILES = sorted(Path(llmcompress.__file__).parent.rglob("*.py"))


def test_no_file_is_longer_than_320_lines() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: lines for path, lines in lengths.items() if lines > 320}


def test_every_module_says_what_it_is() -> None:
    assert not [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_every_public_class_and_function_has_a_docstring() -> None:
    silent = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path}: {node.name}")
    assert not silent
