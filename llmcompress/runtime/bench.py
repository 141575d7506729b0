"""What a folder runs at: tokens per second, time to first token and memory, in turn with the dense model it came from.

Every round of every variant is a process of its own; rounds go through the variants in turn, so that a machine that
slows down slows all of them. Figures are medians over all rounds, with the lowest and highest beside them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.errors import UserError
from llmcompress.measure import versions
from llmcompress.process import WAITING
from llmcompress.runtime.bench_worker import Job, Round
from llmcompress.table import aligned, bytes_text


@dataclass
class Variant:
    """One row of the table.

    Attributes:
        name: what to call it.
        job: what its processes do.
        rounds: what they found.
    """

    name: str
    job: Job
    rounds: list[Round] = field(default_factory=list)

    @property
    def disk_bytes(self) -> int:
        """Of the folder's weights."""
        return sum(file.stat().st_size for file in Path(self.job.folder).glob("*.safetensors"))

    def seconds(self, kind: str, batch: int) -> list[float]:
        """Of every ``prefill`` or ``decode`` step of every round."""
        return [second for found in self.rounds for second in getattr(found, kind)[str(batch)]]

    def rate(self, kind: str, batch: int) -> float:
        """Tokens per second, the median."""
        return self._tokens(kind, batch) / statistics.median(self.seconds(kind, batch))

    def rates(self, kind: str, batch: int) -> dict[str, float]:
        """Tokens per second: the ``median``, the ``low``est and the ``high``est."""
        tokens, seconds = self._tokens(kind, batch), self.seconds(kind, batch)
        found = {"median": statistics.median(seconds), "low": max(seconds), "high": min(seconds)}
        return {key: tokens / value for key, value in found.items()}

    def resident(self) -> int:
        """Bytes of the process, the median over rounds."""
        return int(statistics.median(found.resident_bytes for found in self.rounds))

    def model_bytes(self) -> int:
        """Of them, what loading and running the model added, less what `load` gave back of what was there before."""
        return int(statistics.median(found.resident_bytes - found.base_bytes for found in self.rounds))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures, and the rounds they come from."""
        return {
            "name": self.name,
            "job": asdict(self.job),
            "kernels": self.rounds[-1].kernels,
            "disk_bytes": self.disk_bytes,
            "resident_bytes": self.resident(),
            "model_bytes": self.model_bytes(),
            "batches": {str(batch): self._figures(batch) for batch in self.job.batches},
            "rounds": [asdict(found) for found in self.rounds],
        }

    def _figures(self, batch: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for kind in ("prefill", "decode"):
            figures[f"{kind}_tokens_per_second"] = self.rates(kind, batch)
        figures["first_token_seconds"] = statistics.median(self.seconds("prefill", batch))
        return figures

    def _tokens(self, kind: str, batch: int) -> int:
        return batch * (self.job.prompt if kind == "prefill" else 1)


def measure_in_turn(variants: list[Variant], rounds: int, advance: Callable[[int], None] = lambda steps: None) -> None:
    """Fills ``rounds`` of each variant, one process after the other.

    Raises:
        UserError: a folder cannot be run, or a process was ended, as it is when memory runs out.
    """
    for _ in range(rounds):
        for variant in variants:
            variant.rounds.append(measure_once(variant))
            advance(1)


def table(variants: list[Variant], reference: Variant | None) -> str:
    """The figures for a terminal; × compares with ``reference``."""
    rows = [["", "batch", "prefill tok/s", "×", "decode tok/s", "×", "first token", "resident", "×", "on disk", ""]]
    for variant in variants:
        for number, batch in enumerate(variant.job.batches):
            first = number == 0
            rows.append([variant.name if first else "", str(batch), *_rates(variant, reference, batch)])
            memory = [bytes_text(variant.resident()), _ratio(variant, reference), bytes_text(variant.disk_bytes)]
            rows[-1] += [*(memory if first else ["", "", ""]), ""]
    return aligned(rows)


def machine(threads: int) -> str:
    """Processor, threads and torch in a line: speeds of different machines are not compared."""
    table = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", table.read_text()) if table.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {threads} threads, torch {versions()['torch']}"


def _rates(variant: Variant, reference: Variant | None, batch: int) -> list[str]:
    cells = []
    for kind in ("prefill", "decode"):
        rate = variant.rate(kind, batch)
        cells.append(f"{rate:.1f} {_spread(variant, kind, batch)}")
        cells.append("" if reference is None else f"{rate / reference.rate(kind, batch):.2f}")
    return [*cells, f"{statistics.median(variant.seconds('prefill', batch)):.2f} s"]


def _ratio(variant: Variant, reference: Variant | None) -> str:
    return "" if reference is None else f"{variant.resident() / reference.resident():.2f}"


def _spread(variant: Variant, kind: str, batch: int) -> str:
    """Half of the middle half, in per cent of the median: what a single slow step does not move."""
    seconds = sorted(variant.seconds(kind, batch))
    if len(seconds) < 2:
        return ""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"±{(high - low) / 2 / middle:.0%}"


def measure_once(variant: Variant) -> Round:
    """One round of a variant, in a process of its own.

    Raises:
        UserError: as `measure_in_turn`.
    """
    job = json.dumps(asdict(variant.job))
    environment = WAITING | os.environ
    if variant.job.threads:
        environment["OMP_NUM_THREADS"] = str(variant.job.threads)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llmcompress.runtime.bench_worker", job],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode == 2 and lines and "refused" in lines[-1]:
        raise UserError(*json.loads(lines[-1])["refused"])
    if done.returncode < 0:
        raise UserError(f"the process that measured {variant.name} was ended by signal {-done.returncode}",
                        variant.job.folder, "if memory ran out: smaller --batch or --prompt")  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{variant.name}: {done.stderr[-2000:]}")
    return Round(**json.loads(lines[-1]))
