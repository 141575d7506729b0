"""The same work by llmcompress and by llm-compressor, in turn: seconds, peak memory, perplexity, divergence.

    make bench-setup
    python scripts/bench_peers.py [--model tiny|wide|all] [--only ROW …] [--skip N] [--repeat N] [--threads 2]

Two models: the bundled Llama (``--checkpoint``, float32, 64 × 512 tokens of ``--calibration-text``, judged on
``--eval-text``), and a random one of two TinyLlama blocks (bfloat16, 16 × 512 random tokens, judged on 4 × 512 others:
there the divergence tells how far the outputs move, perplexity tells nothing).

Both programs get the same checkpoint, the same token rows from one file, the same dtype of the arithmetic and the same
number of threads, and run one after the other in processes of their own. ``seconds`` goes from opening the checkpoint
to the complete output folder, without starting Python, importing and evaluating; the least of ``--repeat`` rounds.
Rounding to nearest reads no rows in either.
Our kernels are compiled once per installation, so an uncounted run on a small model comes first; loading them counts.
Peak memory is VmHWM of the whole process, imports included; on a GPU also what torch allocated there. Both outputs are
judged by the same evaluator, ours, which reads what was written and rounds inputs as a run time would.

Rows are merged into scripts/results/peers.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import PRESETS, Shape, write_checkpoint
from safetensors.torch import save_file

from llmcompress import api
from llmcompress.calibration import Calibration, evaluation_rows, token_rows
from llmcompress.evaluate.stream import compare
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.source import Source

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"
OURS, THEIRS = "llmcompress", "llm-compressor"
ROWS = (
    "sparsegpt-50", "sparsegpt-2of4", "gptq-w4a16", "gptq-w8a8", "smoothquant-gptq-w8a8",
    "wanda-50", "wanda-2of4", "rtn-w8a8",
)  # fmt: skip
WARM_UP = Shape(hidden=256, intermediate=512, blocks=1, heads=4, kv_heads=4, vocab=512)


@dataclass(frozen=True)
class Setting:
    """What both programs are given.

    Attributes:
        name: of the model in the table.
        checkpoint: folder.
        dtype: of the arithmetic.
        tokens: safetensors file of the calibration rows, (samples, length).
        judged_on: text, or safetensors file of token rows.
        samples, length: of the calibration rows.
    """

    name: str
    checkpoint: str
    dtype: str
    tokens: str
    judged_on: str
    samples: int
    length: int = 512


class Bench:
    """Runs the programs and judges what they wrote.

    Args:
        options: of the command line.
        work: folder for checkpoints, token rows and outputs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work

    def settings(self) -> list[Setting]:
        """The models asked for, written to disk with their token rows."""
        wanted = self.options.model
        made = [self._tiny()] if wanted in ("tiny", "all") else []
        return made + ([self._wide()] if wanted in ("wide", "all") else [])

    def _tiny(self) -> Setting:
        o = self.options
        samples = o.samples or 64
        rows = token_rows(Calibration(o.calibration_text, o.skip + samples, 512), o.checkpoint)[o.skip :]
        name = "tiny-llama" + f"-from-{o.skip}" * bool(o.skip)
        return Setting(name, o.checkpoint, "float32", self._store("tiny", rows), o.eval_text, samples)

    def _wide(self) -> Setting:
        shape, samples = PRESETS["tinyllama-block"], self.options.samples or 16
        folder = self.work / "tinyllama-block"
        write_checkpoint(folder, shape)
        draw = torch.Generator().manual_seed(1)
        rows, others = (torch.randint(shape.vocab, (n, 512), generator=draw) for n in (samples, 4))
        files = self._store("wide", rows), self._store("wide-judged", others)
        return Setting("tinyllama-block", str(folder), shape.dtype, *files, samples)

    def warm_up(self, recipes: Iterable[str], dtypes: Iterable[str]) -> None:
        """Has our kernels compiled, for rows of each of the ``dtypes``."""
        folder = self.work / "warm-up"
        write_checkpoint(folder, WARM_UP)
        rows = torch.randint(WARM_UP.vocab, (4, 512), generator=torch.Generator().manual_seed(2))
        tokens = self._store("warm-up", rows)
        for dtype, recipe in product(dict.fromkeys(dtypes), recipes):
            self.run(OURS, recipe, Setting("warm-up", str(folder), dtype, tokens, "", 4))

    def row(self, setting: Setting, recipe: str) -> dict[str, Any]:
        """Both programs in turn, ``--repeat`` times."""
        rounds: dict[str, list[dict[str, Any]]] = {program: [] for program in self.options.programs}
        for _ in range(self.options.repeat):
            for program, figures in rounds.items():
                figures.append(self.run(program, recipe, setting))
        given = {"samples": setting.samples, "length": setting.length, "dtype": setting.dtype}
        found: dict[str, Any] = {"setting": given, "machine": machine()}
        for program, figures in rounds.items():
            seconds = [f["seconds"] for f in figures]
            peak = max(f["peak_memory_bytes"] for f in figures)
            found[program] = figures[-1] | {"seconds": min(seconds), "rounds": seconds, "peak_memory_bytes": peak}
            if program == THEIRS:
                found[program]["batch"] = self.options.peer_batch
            if not self.options.no_eval:
                found[program]["quality"] = self.judge(program, recipe, setting)
        return found

    def run(self, program: str, recipe: str, setting: Setting) -> dict[str, Any]:
        """One compression in a process of its own."""
        o = self.options
        output, job, log = (self._output(program, setting, recipe + end) for end in ("", ".json", ".log"))
        shutil.rmtree(output, ignore_errors=True)
        result = self.work / "figures.json"
        result.unlink(missing_ok=True)
        given = asdict(setting) | {"program": program, "recipe": recipe, "threads": o.threads, "device": o.device}
        given["peer_batch"] = o.peer_batch
        job.write_text(json.dumps(given | {"output": str(output), "result": str(result)}))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(o.threads))
        environment = os.environ | threads | {"HF_HUB_OFFLINE": "1"}
        if o.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if program == OURS:
            environment["PYTHONPATH"] = str(HERE.parent)
        python = sys.executable if program == OURS else o.peer_python
        os.sync()  # neither program pays for writing out what the one before it left
        command = [python, str(HERE / "bench_peers_worker.py"), str(job)]
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, cwd=self.work, stdout=file, stderr=file).returncode
        if code or not result.is_file():
            raise SystemExit(f"{program} failed on {recipe} (exit code {code}):\n{log.read_text()[-3000:]}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures

    def judge(self, program: str, recipe: str, setting: Setting) -> dict[str, float]:
        """Perplexity and divergence of an output from its dense model."""
        options = api.Options(length=setting.length, dtype=setting.dtype, device=self.options.device)
        output = self._output(program, setting, recipe)
        source = Source(setting.checkpoint, options)
        rows = evaluation_rows(setting.judged_on, source.folder, setting.length)
        found = compare(source.open(), source.open(Checkpoint(output)), rows)
        bytes_on_disk = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        figures = {k: v for k, v in asdict(found).items() if isinstance(v, int | float)}
        return figures | {"safetensors_bytes": bytes_on_disk}

    def _output(self, program: str, setting: Setting, name: str) -> Path:
        return self.work / f"{setting.name}-{program}-{name}"

    def _store(self, name: str, rows: torch.Tensor) -> str:
        file = self.work / f"{name}-tokens.safetensors"
        save_file({"input_ids": rows.contiguous()}, file)
        return str(file)


def machine() -> dict[str, object]:
    """What the seconds hang on."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def merge(setting: str, recipe: str, row: dict[str, Any]) -> None:
    """Puts a row into the results; a program that did not run this time keeps its figures."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = found.setdefault(setting, {})
    rows[recipe] = rows.get(recipe, {}) | row
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


HEADER = (
    "\n| {} | seconds | llm-compressor | × | peak MiB | llm-compressor | ratio | perplexity | llm-compressor "
    "| KL | llm-compressor |\n|---|" + "---:|" * 10
)


def table_row(recipe: str, row: dict[str, Any]) -> str:
    """One line of Markdown; a dash for what was not measured."""
    ours, theirs = row.get(OURS, {}), row.get(THEIRS, {})
    pairs = [
        (ours.get("seconds"), theirs.get("seconds"), "{:.2f}"),
        (_mib(ours), _mib(theirs), "{:.0f}"),
        *((ours.get("quality", {}).get(k), theirs.get("quality", {}).get(k), form)
          for k, form in (("perplexity_after", "{:.3f}"), ("kl_divergence", "{:.5f}"))),
    ]  # fmt: skip
    cells = [[form.format(x) if x is not None else "–" for x in (a, b)] for a, b, form in pairs]
    for cell, (a, b, _), inverse in zip(cells, pairs[:2], (True, False), strict=False):
        cell.append("–" if a is None or b is None else f"{b / a if inverse else a / b:.2f}")
    return " | ".join([f"| {recipe}", *(c for cell in cells for c in cell)]) + " |"


def _mib(figures: dict[str, Any]) -> float | None:
    peak = figures.get("peak_device_bytes", figures.get("peak_memory_bytes"))
    return None if peak is None else peak / 2**20


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["tiny", "wide", "all"], default="all")
    add("--only", action="append", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}; may be repeated")
    add("--programs", nargs="+", choices=[OURS, THEIRS], default=[OURS, THEIRS])
    add("--repeat", type=int, default=1, help="rounds, of which the fastest counts")
    add("--threads", type=int, default=2)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--samples", type=int, help="calibration rows, instead of 64 and 16")
    add("--skip", type=int, default=0, metavar="N", help="leave out the calibration text's first N rows")
    add("--no-eval", action="store_true", help="time only")
    add("--peer-batch", type=int, default=1, help="rows at once through llm-compressor; its own default is 1")
    add("--peer-python", default=".venv-bench/bin/python", help="has llm-compressor, see `make bench-setup`")
    add("--checkpoint", default="../shared/models/tiny-llama", help="the bundled Llama")
    add("--calibration-text", default="../shared/data/books-calibration.txt")
    add("--eval-text", default="../shared/data/books-heldout.txt")
    add("--work", type=Path, help="folder to make and keep; a temporary one if not given")
    o = parser.parse_args()
    if shutil.which(o.peer_python) is None and THEIRS in o.programs:
        parser.error(f"{o.peer_python} is not there: make bench-setup, or give --peer-python")
    for path in (o.checkpoint, o.calibration_text, o.eval_text) if o.model != "wide" else ():
        if not Path(path).exists():
            parser.error(f"{path} is not there")
    if o.work is not None and o.work.exists():
        parser.error(f"{o.work} is there already")
    o.peer_python = os.path.abspath(shutil.which(o.peer_python) or o.peer_python)
    o.checkpoint, o.eval_text = os.path.abspath(o.checkpoint), os.path.abspath(o.eval_text)
    return o


def main() -> None:
    """Runs the rows asked for, prints them and stores them."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        bench, recipes = Bench(options, work), options.only or ROWS
        settings = bench.settings()
        if OURS in options.programs:
            bench.warm_up(recipes, [setting.dtype for setting in settings])
        for setting in settings:
            print(HEADER.format(f"{setting.name} {setting.samples} × {setting.length} {setting.dtype}"))
            for recipe in recipes:
                row = bench.row(setting, recipe)
                merge(setting.name, recipe, row)
                print(table_row(recipe, row), flush=True)
    print(f"\n{RESULTS}")


if __name__ == "__main__":
    main()
