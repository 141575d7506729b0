"""One round of one variant in a process of its own, so that its memory is its own: reads a `Job` as JSON from the
command line and prints what it measured as JSON on the last line.

    python -m llmcompress.runtime.bench_worker '{"folder": …}'

Tokens are random and the same for every variant. Prefill and decode are the model's own forwards with a KV cache, as
``generate`` calls them: time to first token is one prefill with the choice of a token, a decode step is one token for
each row of the batch."""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.commands.parser import quiet_libraries
from llmcompress.errors import UserError
from llmcompress.measure import peak_memory_bytes, release_freed_memory
from llmcompress.runtime.loading import load, runtime_of
from llmcompress.sampling import check_length

#: prefills are repeated until so many, or so many seconds
PREFILLS, PREFILL_SECONDS = 3, 4.0
#: decode steps before the clock counts
WARM_STEPS = 3


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        folder: of the model.
        dtype: of its arithmetic; empty for the checkpoint's.
        runtime: as `load` has it.
        prompt, new: tokens of the prompt, and tokens decoded after it.
        batches: numbers of rows.
        threads: torch's.
        device: ``cpu`` or ``cuda``.
        logits: file to keep the logits of a short prompt in; empty for none.
    """

    folder: str
    dtype: str = ""
    runtime: str = "auto"
    prompt: int = 256
    new: int = 64
    batches: tuple[int, ...] = (1, 8)
    threads: int = 0
    device: str = "cpu"
    logits: str = ""


@dataclass
class Round:
    """What one process measured.

    Attributes:
        kernels: one line on how matrices are multiplied.
        load_seconds: until the model stands.
        base_bytes: resident before loading: Python and its libraries.
        resident_bytes: resident after everything has run.
        peak_bytes: the highest so far.
        prefill: seconds of each prefill, by batch.
        decode: seconds of each decode step, by batch.
    """

    kernels: str = ""
    load_seconds: float = 0.0
    base_bytes: int = 0
    resident_bytes: int = 0
    peak_bytes: int = 0
    prefill: dict[str, list[float]] = field(default_factory=dict)
    decode: dict[str, list[float]] = field(default_factory=dict)


def resident_bytes() -> int:
    """Pages of this process in memory; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0


def measure(job: Job) -> Round:
    """Loads the folder and times it.

    Raises:
        UserError: as `load`.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    found = Round(base_bytes=resident_bytes())
    began = time.perf_counter()
    model = load(job.folder, job.dtype or None, job.device, job.runtime)
    found.load_seconds = time.perf_counter() - began
    check_length(model.config, job.prompt + job.new, "--prompt and --new")
    found.kernels = runtime_of(model).text()
    _run(model, _tokens(model, 1, 8), 2)
    if job.logits:
        _keep_logits(model, Path(job.logits))
    for batch in job.batches:
        found.prefill[str(batch)], found.decode[str(batch)] = _time(model, job, batch)
    gc.collect()
    release_freed_memory()
    found.resident_bytes, found.peak_bytes = resident_bytes(), peak_memory_bytes("cpu") or 0
    if job.device != "cpu":
        found.resident_bytes = torch.cuda.memory_allocated()
        found.peak_bytes = torch.cuda.max_memory_allocated()
    return found


def _time(model: PreTrainedModel, job: Job, batch: int) -> tuple[list[float], list[float]]:
    """Seconds of each prefill, and of each decode step after the last of them."""
    ids = _tokens(model, batch, job.prompt)
    prefills: list[float] = []
    _run(model, ids[:, : min(job.prompt, 64)], 1)
    steps: list[float] = []
    while len(prefills) < PREFILLS and (not prefills or sum(prefills) < PREFILL_SECONDS):
        last = len(prefills) == PREFILLS - 1
        prefill, steps = _run(model, ids, job.new + WARM_STEPS if last else 0)
        prefills.append(prefill)
    if not steps:
        _, steps = _run(model, ids, job.new + WARM_STEPS)
    return prefills, steps[WARM_STEPS:]


@torch.no_grad()
def _run(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[float, list[float]]:
    """Seconds until the first token is chosen, and of ``new`` steps after it."""
    cuda = ids.device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    marks = [now()]
    cache: Any = None
    for _ in range(new + 1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        marks.append(now())
    seconds = [after - before for before, after in pairwise(marks)]
    return seconds[0], seconds[1:]


def _tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=draw).to(model.device)


@torch.no_grad()
def _keep_logits(model: PreTrainedModel, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"logits": model(_tokens(model, 1, 64)).logits.float().cpu().contiguous()}, file)


def main() -> int:
    """Measures; prints the round, or ``{"refused": …}`` where the folder cannot be run."""
    quiet_libraries()
    given = json.loads(sys.argv[1])
    job = Job(**{**given, "batches": tuple(given["batches"])})
    try:
        found = asdict(measure(job))
    except UserError as error:
        print(json.dumps({"refused": [error.what, error.where, error.fix]}))
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
