"""``python -m llmcompress inspect FOLDER``: what a checkpoint holds, and whether a compressed one is what it says.

Exit codes: 0 all holds, 1 something is not as the folder says, 2 no checkpoint to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from llmcompress.commands.parser import Parser, libraries


def run(arguments: Sequence[str]) -> int:
    """Inspects; returns the exit code."""
    options = _parser().parse_args(arguments)
    with libraries():
        from llmcompress.inspection.inspect import inspect
        from llmcompress.inspection.table import text
        from llmcompress.model.locate import locate

    shows = sys.stderr.isatty() and not options.json

    def advance(what: str) -> None:
        if shows:
            print(f"\r\x1b[K{what[:100]}", end="", file=sys.stderr, flush=True)

    found = inspect(locate(options.model, "MODEL"), options.trust_remote_code, advance)
    advance("")
    if options.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        print(text(found, options.all, colour=sys.stdout.isatty()))
    return 0 if found.holds else 1


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress inspect",
        description="Show blocks, input groups, bytes, bits, zeros and outliers of a checkpoint; verify a compressed "
        "one: hashes, masks, grids, scales, configuration, report. Exits with 1 if it is not what it says.",
        epilog="The outlier ratio of a row (output) or column (input) is its largest magnitude over its root mean "
        "square; a matrix is told by its worst one. Random normal weights have about 4.",
    )
    add = parser.add_argument
    add("model", metavar="PRESET|FOLDER|HUB_ID", help="what to look at")
    add("--all", action="store_true", help="a line per matrix instead of one per block")
    add("--json", action="store_true", help="print only the figures and findings, as JSON")
    add("--trust-remote-code", action="store_true", help="run code that came with the checkpoint")
    return parser
