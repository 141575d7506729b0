"""The command line. Without a subcommand it compresses; subcommands have one line each in COMMANDS.

Exit codes: 0 done, 1 internal failure (with a traceback), 2 bad input (one line), 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from llmcompress.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    # Waiting threads sleep instead of spinning: costs little alone, and saves a tenfold where cores are shared with
    # other programs. It counts only if it is said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "compress"
    try:
        return COMMANDS[name](arguments)
    except UserError as error:
        print(f"llmcompress: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llmcompress: interrupted, nothing was written", file=sys.stderr)
        return 130


def compress_command(arguments: Sequence[str]) -> int:
    """``python -m llmcompress --model llama``."""
    parser = _compress_parser()
    options = parser.parse_args(arguments)
    _quiet_libraries()
    from llmcompress import api
    from llmcompress.progress import Progress

    run = api.Options(
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
        trust_remote_code=options.trust_remote_code,
    )
    if options.dry_run:
        found = api.plan(options.model, options.recipe, options.output, run, overrides=options.set, force=options.force)
        print(json.dumps(found.to_dict(), indent=2) if options.json else found.text())
        return 0
    report = api.compress(
        options.model,
        options.recipe,
        options.output,
        run,
        overrides=options.set,
        force=options.force,
        progress=Progress(silent=options.json),
        command=shlex.join(["python", "-m", "llmcompress", *arguments]),
    )
    print(report.to_json() if options.json else report.table())
    return 0


#: subcommand → what runs it; the plain form is `compress`
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"compress": compress_command}


def _compress_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m llmcompress",
        description="Compress a language model: prune, smooth, quantize, or all of it jointly, and say what it cost.",
        epilog="Example: python -m llmcompress --model llama --recipe jsq-2of4",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="PRESET|FOLDER|HUB_ID",
        help="what to compress; 'llama' comes with the package",
    )
    add("--recipe", default="jsq", metavar="NAME|FILE.yaml", help="what to do to it (default: jsq)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="change the recipe, e.g. prune.sparsity=2:4",
    )
    add("--output", metavar="DIR", help="folder to write (default: compressed/<model>-<recipe>)")
    add("--force", action="store_true", help="replace an output folder this program wrote before")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")
    add("--json", action="store_true", help="print only the report, as JSON")

    data = parser.add_argument_group("calibration and evaluation")
    add = data.add_argument
    add("--calibration", default="self", metavar="self|FILE.txt|FILE.jsonl|FILE.safetensors|DATASET[:split]",
        help="text the model is calibrated on; 'self' samples the model (default)")  # fmt: skip
    add("--samples", type=int, default=32, metavar="N", help="calibration rows (default: 32)")
    add("--length", type=int, default=512, metavar="L", help="tokens per row (default: 512)")
    judged = data.add_mutually_exclusive_group()
    judged.add_argument(
        "--eval-text",
        metavar="FILE",
        help="text on which the result is judged (default: held-out samples of the model)",
    )
    judged.add_argument("--no-eval", action="store_true", help="skip the evaluation")
    add("--seed", type=int, default=0, metavar="S", help="of everything random (default: 0)")

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
    add("--trust-remote-code", action="store_true", help="run code that came with the checkpoint")
    return parser


def _quiet_libraries() -> None:
    """What transformers would print about loading is for its own users."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
