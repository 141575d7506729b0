"""``python -m llmcompress report FOLDER``: writes the ``report.html`` of a compressed folder anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands.parser import Parser
from llmcompress.errors import UserError
from llmcompress.export.destination import holds_network


def run(arguments: Sequence[str]) -> int:
    """Renders; returns the exit code."""
    parser = Parser(
        prog="python -m llmcompress report",
        description="Write report.html anew from report.json, and from recipe.yaml and bench.json if they are there.",
        epilog="Example: python -m llmcompress report compressed/llama-jsq",
    )
    parser.add_argument("folder", metavar="FOLDER", help="what a run of this program wrote")
    parser.add_argument("--output", metavar="FILE.html", help="file to write (default: report.html in the folder)")
    options = parser.parse_args(arguments)
    page = _page(Path(options.folder))
    target = Path(options.output) if options.output else Path(options.folder) / "report.html"
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", str(target), "choose another --output") from None
    print(f"written to {target}")
    return 0


def _page(folder: Path) -> str:
    if holds_network(folder):
        from llmcompress.pages.vision_page import read_vision

        return read_vision(folder)
    from llmcompress.pages.report_page import report_page
    from llmcompress.pages.results import read_result

    return report_page(read_result(folder))
