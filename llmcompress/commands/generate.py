"""``python -m llmcompress generate FOLDER --prompt …``: the folder's model continues a text, shown as it comes."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from llmcompress.commands.parser import Parser, libraries, positive
from llmcompress.runtime.summary import RUNTIMES, StaysDense


def run(arguments: Sequence[str]) -> int:
    """Streams the text to standard output and its speed to standard error; returns the exit code."""
    options = _parser().parse_args(arguments)
    with libraries():
        import torch
        from transformers import TextStreamer

        from llmcompress.model.locate import locate
        from llmcompress.runtime.loading import load, runtime_of
        from llmcompress.sampling import check_length

    folder = locate(options.folder, "FOLDER")
    tokenizer = _tokenizer(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaysDense)  # the last line says it
        model: Any = load(folder, options.dtype, options.device, options.runtime)
    torch.manual_seed(options.seed)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    check_length(model.config, inputs["input_ids"].shape[1] + options.new, "--prompt and --new")
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    print(options.prompt, end="", flush=True)
    began = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**inputs, **sampling, max_new_tokens=options.new, streamer=streamer)
    seconds, new = time.perf_counter() - began, tokens.shape[1] - inputs["input_ids"].shape[1]
    print(
        f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} per second; {runtime_of(model).text()}", file=sys.stderr
    )
    return 0


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    from llmcompress.errors import UserError

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError("no tokenizer in it", folder, "copy the dense model's tokenizer files there") from error


def _parser() -> Parser:
    parser = Parser(
        prog="python -m llmcompress generate",
        description="Let a folder's model continue a text.",
        epilog='Example: python -m llmcompress generate compressed/llama-jsq --prompt "It was a dark"',
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER|PRESET|HUB_ID", help="the model, compressed or not")
    add("--prompt", required=True, help="how the text begins")
    add("--new", type=positive, default=128, metavar="N", help="tokens at most (default: 128)")
    add("--temperature", type=_temperature, default=0.0, metavar="T",
        help="of the sampling; 0 takes the most likely token (default)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of the sampling (default: 0)")
    add("--runtime", default="auto", choices=RUNTIMES, help="of the matrices (default: auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic (default: the checkpoint's)")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature")
    return float(text)
