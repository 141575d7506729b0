"""What the subcommands' lines have in common."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from llmcompress.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, f"see {self.prog} --help")


def add_recipe_options(parser: Parser, recipe: str, change: str, misfit: str) -> None:
    """What is done, where it goes and what is shown: of the commands that compress.

    Args:
        parser: gets the options.
        recipe: default.
        change: of a recipe, as an example.
        misfit: default of ``--on-misfit``.
    """
    add = parser.add_argument
    add("--recipe", default=recipe, metavar="NAME|FILE.yaml", help=f"what to do to it (default: {recipe})")
    add("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help=f"change the recipe, e.g. {change}")
    add("--output", metavar="DIR", help="folder to write (default: compressed/<model>-<recipe>)")
    add("--on-misfit", default=misfit, choices=["refuse", "skip"],
        help=f"what a pattern or group does not divide: refuse it, or leave it dense (default: {misfit})")  # fmt: skip
    add("--force", action="store_true", help="replace an output folder this program wrote before")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")
    add("--json", action="store_true", help="print only the report, as JSON")


def add_seed(parser: argparse._ActionsContainer) -> None:
    """Of the commands that draw anything."""
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random (default: 0)")


def positive(text: str) -> int:
    """Type of an option: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def positives(text: str) -> list[int]:
    """Type of an option: such numbers, with commas between them."""
    return [positive(part) for part in text.split(",")]


def check_file(option: str, file: str | Path) -> None:
    """Says before the work, not after it, that a result could not be written.

    Raises:
        UserError: ``file`` is a folder, or its own folder does not exist.
    """
    if Path(file).is_dir():
        raise UserError("is a folder", f"{option} {file}", "give a file")
    if not Path(file).absolute().parent.is_dir():
        raise UserError("its folder does not exist", f"{option} {file}", "make the folder first")


@contextmanager
def libraries() -> Iterator[None]:
    """Around a command's imports. What is loaded is not looked through for garbage, then or later: there is none, and
    looking takes a second."""
    gc.disable()
    try:
        quiet_libraries()
        yield
        gc.freeze()
    finally:
        gc.enable()


def quiet_libraries() -> None:
    """What transformers would print about loading is for its own users."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
