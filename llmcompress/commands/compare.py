"""``python -m llmcompress compare RUN1 RUN2 …``: one table and one page of what several results cost and bought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands.parser import Parser
from llmcompress.errors import UserError

#: stands in every page of this program: what has it may be replaced
_OURS = '<meta name="generator" content="llmcompress">'


def run(arguments: Sequence[str]) -> int:
    """Compares; returns the exit code."""
    parser = Parser(
        prog="python -m llmcompress compare",
        description="Compare compressed folders: quality against size, non-zero weights and speed (where `bench` "
        "measured it). Results judged on other text, or made of another dense model, are kept apart.",
        epilog="Example: python -m llmcompress compare compressed/llama-jsq compressed/llama-gptq-w4a16",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that this program wrote")
    parser.add_argument("--output", metavar="FILE.html", help="page to write (default: comparison.html here)")
    parser.add_argument("--json", action="store_true", help="print only JSON; write a page only with --output")
    options = parser.parse_args(arguments)
    target = Path(options.output or "comparison.html")
    writes = bool(options.output) or not options.json
    if writes:
        _check(target)
    from llmcompress.pages.compare_page import as_dict, compare_page, text
    from llmcompress.pages.frontier import ranked
    from llmcompress.pages.results import read_results

    groups = ranked(read_results(options.runs))
    if writes:
        try:
            target.write_text(compare_page(groups), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", str(target), "choose another --output") from None
    print(json.dumps(as_dict(groups), indent=2, ensure_ascii=False) if options.json else text(groups))
    if writes and not options.json:
        print(f"\nwritten to {target}")
    return 0


def _check(target: Path) -> None:
    """Refuses to replace what is not a page of this program."""
    if target.is_dir():
        raise UserError("is a folder", str(target), "give a file, e.g. --output comparison.html")
    if target.is_file() and _OURS not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UserError("exists and is not a page of this program", str(target), "choose another --output")
