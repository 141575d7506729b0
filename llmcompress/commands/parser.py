"""What every subcommand's line has in common."""

from __future__ import annotations

import argparse
from typing import NoReturn

from llmcompress.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, f"see {self.prog} --help")


def quiet_libraries() -> None:
    """What transformers would print about loading is for its own users."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
