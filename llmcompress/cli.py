"""The command line. Without a subcommand it compresses; each subcommand is a file of `llmcompress.commands`.

Exit codes: 0 done, 1 internal failure (with a traceback) or a check that did not hold, 2 bad input (one line),
130 interrupted, 141 nobody reads the output to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from llmcompress.commands import COMMANDS
from llmcompress.errors import UserError
from llmcompress.process import WAITING


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    os.environ.update(WAITING | os.environ)
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "compress"
    try:
        code = int(import_module(f"llmcompress.commands.{name}").run(arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"llmcompress: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would fail
        return 141
    except KeyboardInterrupt as error:
        print(f"llmcompress: interrupted, {str(error) or 'nothing was written'}", file=sys.stderr)
        return 130
