"""``python -m llmcompress eval MODEL``: what a model is worth, alone or beside the model it was made from."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands.parser import Parser, add_seed, check_file, libraries

EXAMPLES = """examples:
  python -m llmcompress eval compressed/llama-jsq --reference llama --text held-out.txt
  python -m llmcompress eval llama --tasks blimp_local=pairs.jsonl,choices_local=questions.jsonl
  python -m llmcompress eval compressed/llama2 --reference meta-llama/Llama-2-7b-hf --tasks jsq_table --json out.json
"""


def run(arguments: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.json not in (None, "-"):
        check_file("--json", options.json)
    with libraries():
        from llmcompress import api
        from llmcompress.progress import Progress

    wanted = api.EvalOptions(
        texts=tuple(options.text),
        tasks=tuple(options.tasks),
        limit=options.limit,
        length=options.length,
        stride=options.stride,
        windows=options.windows,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        runtime=options.runtime,
        trust_remote_code=options.trust_remote_code,
    )
    found = api.evaluate(
        options.model,
        options.reference,
        wanted,
        progress=Progress(silent=options.json == "-"),
        command=shlex.join(["python", "-m", "llmcompress", "eval", *arguments]),
    )
    if options.json == "-":
        print(found.to_json())
        return 0
    print(found.table())
    if options.json is not None:
        Path(options.json).write_text(found.to_json() + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress eval",
        description="Evaluate a model on texts and lm-eval tasks, with intervals; with a reference, by paired tests.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="preset, folder (compressed or not) or Hub id")
    add("--reference", metavar="DENSE", help="the model it was made from, for KL, agreement and paired tests")
    add("--text", nargs="+", action="extend", default=[], metavar="FILE",
        help="text to measure perplexity on: UTF-8, or .jsonl with a 'text' per line")  # fmt: skip
    add("--tasks", action="append", default=[], metavar="A,B,…",
        help="lm-eval tasks: names, NAME=FILE for one over your data (blimp_local, choices_local, text_local), "
        "or your own FILE.yaml; jsq_table is the suite of JSQ's table")  # fmt: skip
    add(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N items of a task and windows of a text, to try things out",
    )
    add("--json", metavar="FILE", help="write the result there too; '-' prints nothing else")

    cut = parser.add_argument_group("windows")
    add = cut.add_argument
    add("--length", type=int, metavar="L",
        help="tokens per window and per input of a task (default: 512; tasks: the model's, up to 4096)")  # fmt: skip
    add("--stride", type=int, metavar="S", help="tokens predicted per window (default: L, as lm-eval does)")
    add("--windows", default="rolling", choices=["rolling", "rows"],
        help="rolling predicts every token once (default); rows are what the papers cut texts into")  # fmt: skip

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add_seed(parser)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the arithmetic")
    add("--runtime", default="simulated", metavar="NAME",
        help="simulated: weights as stored and activations rounded, in floating point (default); "
        "auto, int8, int4 or dense: as load() would run it")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run code that came with the checkpoint")
    return parser
