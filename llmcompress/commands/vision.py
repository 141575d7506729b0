"""``python -m llmcompress vision``: compress a convolutional network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from llmcompress.commands.parser import Parser, add_recipe_options, add_seed, libraries


def run(arguments: Sequence[str]) -> int:
    """Compresses; returns the exit code."""
    options = _parser().parse_args(arguments)
    with libraries():
        from llmcompress.progress import Progress
        from llmcompress.vision import VisionOptions, VisionRun

    wanted = VisionOptions(
        data=options.data,
        samples=options.samples,
        batch=options.batch,
        image_size=options.image_size,
        seed=options.seed,
        evaluate=not options.no_eval,
        recover_epochs=options.recover_epochs,
        on_misfit=options.on_misfit,
        export=options.export,
    )
    work = VisionRun(options.model, options.recipe, options.output, wanted, overrides=options.set, force=options.force)
    if options.dry_run:
        plan = work.plan()
        if options.json:
            print(json.dumps(plan, indent=2))
        else:
            from llmcompress.vision.show import plan_text

            print(plan_text(plan))
        return 0
    with Progress(silent=options.json) as progress:
        report = work.execute(progress, shlex.join(["python", "-m", "llmcompress", "vision", *arguments]))
    print(report.to_json() if options.json else report.table())
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress vision",
        description="Compress a convolutional network: prune weights or whole channels, quantize, or both, with "
        "calibration images alone, and say what it cost.",
        epilog="Example: python -m llmcompress vision --recipe int8   (the bundled network, no network access needed)",
    )
    add = parser.add_argument
    add("--model", default="resnet", metavar="resnet|mobilenet|FOLDER|module:function",
        help="a bundled network (default: resnet), a folder, or a function that returns a module")  # fmt: skip
    add("--data", default="digits", metavar="digits|FOLDER|FILE.npz",
        help="images: the bundled digits (default), a folder per class, or arrays images and labels")  # fmt: skip
    add_recipe_options(parser, "int8", "channels.ratio=0.3", "skip")
    add("--export", type=_kinds, default=(), metavar="program,onnx",
        help="files for other programs beside the result: network.pt2, network.onnx")  # fmt: skip
    add("--samples", type=int, default=512, metavar="N", help="calibration images (default: 512)")
    add("--batch", type=int, default=64, metavar="N", help="images at once (default: 64)")
    add("--image-size", type=int, default=0, metavar="P", help="side of a folder's images (default: the network's)")
    add_seed(parser)
    add("--recover-epochs", type=int, default=0, metavar="N",
        help="train N epochs after channels went, and at the end with what is pruned or rounded held "
        "(default: the recipe's)")  # fmt: skip
    add("--no-eval", action="store_true", help="skip the evaluation")
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
