"""``python -m llmcompress --model llama``: compress a checkpoint. The subcommand that needs no name."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from llmcompress.commands import COMMANDS
from llmcompress.commands.parser import Parser, add_recipe_options, add_seed, libraries
from llmcompress.process import share_heap


def run(arguments: Sequence[str]) -> int:
    """Compresses; returns the exit code."""
    options = _parser().parse_args(arguments)
    share_heap()
    with libraries():
        from llmcompress import api
        from llmcompress.export.sparse import pack
        from llmcompress.progress import Progress

    wanted = api.Options(
        calibration=options.calibration,
        samples=options.samples,
        length=options.length,
        eval_text=options.eval_text,
        evaluate=not options.no_eval,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        recover_steps=options.recover_steps,
        recover=options.recover,
        low_memory=options.low_memory,
        offload_activations=options.offload_activations,
        on_misfit=options.on_misfit,
        trust_remote_code=options.trust_remote_code,
    )
    if options.dry_run:
        found = api.plan(
            options.model, options.recipe, options.output, wanted,
            overrides=options.set, force=options.force or options.resume,
        )  # fmt: skip
        print(json.dumps(found.to_dict(), indent=2) if options.json else found.text())
        return 0
    follows = os.environ.get("RANK", "0") != "0"  # a launcher's other process has the word
    report = api.compress(
        options.model,
        options.recipe,
        options.output,
        wanted,
        overrides=options.set,
        force=options.force,
        resume=options.resume,
        progress=Progress(silent=options.json or follows),
        command=shlex.join(["python", "-m", "llmcompress", *(a for a in arguments if a != "--resume")]),
    )
    if not follows:
        if options.pack:
            pack(Path(report.output), Path(report.output), force=True)
        print(report.to_json() if options.json else report.table())
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress",
        description="Compress a language model: prune, smooth, quantize, or all of it jointly, and say what it cost.",
        epilog="Example: python -m llmcompress --model llama --recipe jsq-2of4\n\n"
        + "subcommands (each has its own --help):\n"
        + "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PRESET|FOLDER|HUB_ID",
        help="what to compress; 'llama' comes with the package")  # fmt: skip
    add_recipe_options(parser, "jsq", "prune.sparsity=2:4", "refuse")
    add("--resume", action="store_true", help="go on with a run that was killed or interrupted")
    add("--pack", choices=["sparse"], help="leave the zeros out of the files; `unpack` the folder before it is used")

    data = parser.add_argument_group("calibration and evaluation")
    add = data.add_argument
    add("--calibration", default="self", metavar="self|none|FILE.txt|FILE.jsonl|FILE.safetensors|DATASET[:split]",
        help="text the model is calibrated on; 'self' samples the model (default), 'none' is for recipes whose steps "
        "read no rows")  # fmt: skip
    add("--samples", type=int, default=32, metavar="N", help="calibration rows (default: 32)")
    add("--length", type=int, default=512, metavar="L", help="tokens per row (default: 512)")
    judged = data.add_mutually_exclusive_group()
    judged.add_argument(
        "--eval-text",
        metavar="FILE",
        help="text on which the result is judged (default: held-out samples of the model)",
    )
    judged.add_argument("--no-eval", action="store_true", help="skip the evaluation")
    add_seed(data)

    recovery = parser.add_argument_group("recovery after a step that makes matrices smaller")
    add = recovery.add_argument
    add("--recover-steps", type=int, default=0, metavar="N", help="train N steps on the calibration rows (default: 0)")
    add("--recover", default="full", choices=["full", "lora"],
        help="what is trained: all weights of the blocks, or low-rank additions (by peft; default: full)")  # fmt: skip

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the arithmetic, not of the result")
    add("--low-memory", action="store_true", help="replay blocks instead of suspending them: slower, same result")
    add("--offload-activations", action="store_true", help="--low-memory, and what travels between blocks on disk")
    add("--trust-remote-code", action="store_true", help="run code that came with the checkpoint")
    return parser
