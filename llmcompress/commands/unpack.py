"""``python -m llmcompress unpack FOLDER OUT``: the checkpoint that was packed, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands.parser import Parser


def run(arguments: Sequence[str]) -> int:
    """Unpacks; returns the exit code."""
    parser = Parser(
        prog="python -m llmcompress unpack",
        description="Turn a folder that `pack` (or --pack sparse) wrote back into the checkpoint, bit for bit.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a packed folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--force", action="store_true", help="replace a folder this program wrote before")
    options = parser.parse_args(arguments)
    from llmcompress.export.sparse import unpack
    from llmcompress.table import bytes_text

    size = unpack(options.folder, options.output, options.force)
    print(f"{options.output}: {bytes_text(size['before'])} packed, {bytes_text(size['after'])} unpacked, hashes agree")
    return 0
