"""``python -m llmcompress bench FOLDER``: what the folder runs at, beside the dense model it came from."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.commands.parser import Parser, check_file, libraries, positive, positives
from llmcompress.runtime.summary import RUNTIMES

if TYPE_CHECKING:
    from llmcompress.runtime.bench import Variant


def run(arguments: Sequence[str]) -> int:
    """Measures, prints a table, writes JSON and a plot; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.json is not None:
        check_file("--json", options.json)
    with libraries():
        from llmcompress.errors import UserError
        from llmcompress.export.destination import RECORD
        from llmcompress.model.locate import locate
        from llmcompress.progress import Progress
        from llmcompress.runtime.bench import machine, measure_in_turn, table
        from llmcompress.runtime.bench_plot import draw
        from llmcompress.runtime.loading import check_checkpoint

    folder = Path(options.folder)
    check_checkpoint(folder)
    against = None if options.against is None else locate(options.against, "--against")
    threads = options.threads or _usable_threads()
    variants = _variants(folder, against, options, threads)
    dense = next((v for v in variants if v.job.dtype == "bfloat16" and v.name.startswith("dense")), None)
    with Progress() as progress, progress.phase("measuring", len(variants) * options.rounds, "process") as advance:
        measure_in_turn(variants, options.rounds, advance)
    found = {"machine": machine(threads), "prompt": options.prompt, "new": options.new}
    found |= {"tokens_per_second": _pairs(variants[0], dense), "variants": [variant.to_dict() for variant in variants]}
    content = json.dumps(found, indent=1)
    if options.json == Path("-"):
        print(content)
        return 0
    print(table(variants, dense))
    print("\n" + variants[0].rounds[-1].kernels)
    file = options.json or (folder / "bench.json" if (folder / RECORD).is_file() else None)
    if file is None:
        return 0
    try:
        file.write_text(content + "\n", encoding="utf-8")
        drawn = draw(variants, file.with_suffix(".png"))
    except OSError as error:
        raise UserError(error.strerror or str(error), str(file), "choose another --json") from error
    print(f"written to {file}" + (f" and {file.with_suffix('.png')}" if drawn else "; no plot without matplotlib"))
    return 0


def _variants(folder: Path, against: Path | None, options: argparse.Namespace, threads: int) -> list[Variant]:
    """The folder first, then the dense model in each dtype."""
    from llmcompress.runtime.bench import Variant
    from llmcompress.runtime.bench_worker import Job

    def job(folder: Path, dtype: str, runtime: str) -> Job:
        return Job(
            str(folder), dtype, runtime, options.prompt, options.new, tuple(options.batch), threads, options.device
        )

    found = [Variant(folder.resolve().name, job(folder, options.dtype or "", options.runtime))]
    if against is None:
        return found
    for dtype in options.dense:
        found.append(Variant(f"dense {dtype}", job(against, dtype, "dense")))
    return found


def _pairs(variant: Variant, dense: Variant | None) -> dict[str, dict[str, float]]:
    """Prefill and decode of the first batch size, ``after`` and, where it was measured, ``before``."""
    batch = variant.job.batches[0]
    pairs = {kind: {"after": variant.rate(kind, batch)} for kind in ("prefill", "decode")}
    for kind, pair in pairs.items():
        if dense is not None:
            pair["before"] = dense.rate(kind, batch)
    return pairs


def _usable_threads() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - {"float32", "bfloat16"}:
        raise argparse.ArgumentTypeError(f"'{text}' is neither float32 nor bfloat16 nor both, with a comma")
    return names


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress bench",
        description="Measure tokens per second, time to first token and memory of a folder, each in its own process.",
        epilog="Example: python -m llmcompress bench compressed/llama-jsq --against llama",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a checkpoint folder, compressed or not")
    add("--against", metavar="PRESET|FOLDER|HUB_ID", help="the dense model, measured in turn with it")
    add("--dense", type=_dtypes, default=["float32", "bfloat16"], metavar="DTYPES",
        help="what the dense model computes in (default: float32,bfloat16)")  # fmt: skip
    add("--prompt", type=positive, default=256, metavar="N", help="tokens of the prompt (default: 256)")
    add("--new", type=positive, default=64, metavar="N", help="tokens decoded after it (default: 64)")
    add("--batch", type=positives, default=[1, 8], metavar="N,N", help="rows at once (default: 1,8)")
    add("--rounds", type=positive, default=3, metavar="N", help="processes for each row of the table (default: 3)")
    add("--threads", type=positive, metavar="N", help="default: as many as the process may use")
    add("--runtime", default="auto", choices=RUNTIMES, help="of the folder (default: auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the folder's arithmetic (default: the checkpoint's)")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--json", type=Path, metavar="FILE",
        help="'-' prints nothing else; default: bench.json in the folder, if this program wrote it")  # fmt: skip
    return parser
