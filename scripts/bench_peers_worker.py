"""One compression, timed: what `bench_peers.py` starts in a process of its own.

    python scripts/bench_peers_worker.py JOB.json

The job names the program (``llmcompress`` or ``llm-compressor``), the recipe, checkpoint, token rows, dtype, threads,
device and output; the figures are written to the file that it names as ``result``. The clock runs from before the
checkpoint is opened until the output folder is complete; starting Python, importing the program and making
llm-compressor's data loader come before. Ours runs as `python -m llmcompress` has it, its waiting threads asleep (to
llm-compressor that would be no help), on one heap (with that, its `wanda-2of4` was 8 % faster), and what was imported
out of the garbage collector's way. This file imports neither program before it knows which one to time."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

JOB = json.loads(Path(sys.argv[1]).read_text()) if __name__ == "__main__" else {}
if JOB.get("program") == "llmcompress":
    from llmcompress.process import WAITING, share_heap

    os.environ.update(WAITING | os.environ)  # before torch is loaded
    share_heap()

import torch  # noqa: E402

#: recipes for which llm-compressor reads no rows either
DATA_FREE = ("rtn-w8a8",)
#: the linear layers of Llama's blocks; a pruner of llm-compressor told to ignore the head prunes it if it is tied
PROJECTIONS = ["re:.*(q|k|v|o|gate|up|down)_proj$"]


def llmcompress_run(job: dict[str, Any]) -> Callable[[], object]:
    """Compression by this project, without evaluation."""
    from llmcompress.commands.parser import libraries

    with libraries():
        from llmcompress import api

    rows = "none" if job["recipe"] in DATA_FREE else job["tokens"]
    options = api.Options(
        calibration=rows, samples=job["samples"], length=job["length"], evaluate=False,
        device=job["device"], dtype=job["dtype"],
    )  # fmt: skip
    return lambda: api.compress(job["checkpoint"], job["recipe"], job["output"], options, force=True)


def llm_compressor_run(job: dict[str, Any]) -> Callable[[], object]:
    """Load, ``oneshot`` and save by llm-compressor, every option that is not named left at its default."""
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    recipe = llm_compressor_recipe(job["recipe"])
    rows = load_file(job["tokens"])["input_ids"][: job["samples"]]
    loader = DataLoader([{"input_ids": row} for row in rows], batch_size=job["peer_batch"])

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=getattr(torch, job["dtype"]))
        tokenizer = _tokenizer(job["checkpoint"])
        oneshot(model=model, processor=tokenizer, dataset=loader, recipe=recipe, output_dir=job["output"])

    return run


def llm_compressor_recipe(name: str) -> list[Any]:
    """The modifiers that do what our recipe of the same name does."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def pruned(modifier: type, mask: str) -> list[Any]:
        return [modifier(sparsity=0.5, mask_structure=mask, targets=PROJECTIONS)]

    def quantized(modifier: type, scheme: str) -> list[Any]:
        return [modifier(scheme=scheme, targets=PROJECTIONS)]

    recipes: dict[str, Callable[[], list[Any]]] = {
        "sparsegpt-50": lambda: pruned(SparseGPTModifier, "0:0"),
        "sparsegpt-2of4": lambda: pruned(SparseGPTModifier, "2:4"),
        "wanda-50": lambda: pruned(WandaPruningModifier, "0:0"),
        "wanda-2of4": lambda: pruned(WandaPruningModifier, "2:4"),
        "gptq-w4a16": lambda: quantized(GPTQModifier, "W4A16"),
        "gptq-w8a8": lambda: quantized(GPTQModifier, "W8A8"),
        "smoothquant-gptq-w8a8": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8), *quantized(GPTQModifier, "W8A8")
        ],
        "rtn-w8a8": lambda: quantized(QuantizationModifier, "W8A8"),
    }  # fmt: skip
    return recipes[name]()


def _tokenizer(folder: str) -> Any:
    """The checkpoint's tokenizer; an empty one where there is none, since ``oneshot`` insists on one to be saved."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (Path(folder) / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    empty = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>")


PROGRAMS = {"llmcompress": llmcompress_run, "llm-compressor": llm_compressor_run}
_PACKAGES = ("llmcompress", "llmcompressor", "torch", "transformers", "compressed-tensors", "safetensors", "numba")


def versions(program: str) -> dict[str, str]:
    """Of the packages that this process can use; not of the other program, if it is installed too."""
    other = "llmcompressor" if program == "llmcompress" else "llmcompress"
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found.pop(other, None)
    return found


def memory(field: str) -> int:
    """Bytes: ``VmRSS`` of this process now, or ``VmHWM``, the highest so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(job: dict[str, Any]) -> None:
    """Runs the job and writes its figures."""
    torch.set_num_threads(job["threads"])
    run = PROGRAMS[job["program"]](job)
    imported = memory("VmRSS")
    started = time.perf_counter()
    run()
    if job["device"] == "cuda":
        torch.cuda.synchronize()
    figures = {
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": memory("VmHWM"),
        "after_imports_bytes": imported,
        "threads": torch.get_num_threads(),
        "versions": versions(job["program"]),
    }
    if job["device"] == "cuda":
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    Path(job["result"]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(JOB)
