"""``python -m llmcompress pack FOLDER OUT``: a finished folder in another container."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands.parser import Parser, libraries

_KINDS = ("sparse", "gptq", "gptq-v2", "bitsandbytes-int8", "bitsandbytes-nf4")


def run(arguments: Sequence[str]) -> int:
    """Packs; returns the exit code."""
    options = _parser().parse_args(arguments)
    with libraries():
        from llmcompress.table import bytes_text

    if options.to == "sparse":
        from llmcompress.export.sparse import pack

        size = pack(options.folder, options.output, options.force)
    else:
        size = _converted(options)
    share = size["after"] / size["before"]
    print(f"{options.output}: {bytes_text(size['before'])} → {bytes_text(size['after'])} ({share:.1%})")
    return 0


def _converted(options: argparse.Namespace) -> dict[str, int]:
    """Writes another program's layout; bytes ``before`` and ``after``."""
    from llmcompress.runtime.loading import check_checkpoint

    check_checkpoint(options.folder)
    if options.to.startswith("gptq"):
        from llmcompress.export.to_gptq import to_gptq

        return to_gptq(options.folder, options.output, options.to, options.force)
    from llmcompress.export.bitsandbytes import to_bitsandbytes

    return to_bitsandbytes(options.folder, options.output, options.to, options.force)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress pack",
        description="Write a finished folder in another container. 'sparse' leaves the zeros out, for storing and "
        "sending; `unpack` brings every byte back. 'gptq' is GPTQ's layout of weight-only integers, for servers that "
        "do not take compressed-tensors; 'gptq-v2' stores its zero points as they are, not less one. 'bitsandbytes-…' "
        "rounds floating-point weights.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a checkpoint folder")
    add("output", type=Path, metavar="OUT", help="the folder to write")
    add("--to", default="sparse", choices=_KINDS, help="the container (default: sparse)")
    add("--force", action="store_true", help="replace a folder this program wrote before")
    return parser
