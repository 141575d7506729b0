"""Reports that are made up, and a reader of pages that shares nothing with what writes them."""

from __future__ import annotations

import random
from html.parser import HTMLParser
from pathlib import Path

import torch

from llmcompress.core.profile import described
from llmcompress.pages.results import Result
from llmcompress.report import BlockReport, GroupReport, MatrixReport, Report

KINDS = {
    "self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }} & $\\frac$ 模型 ‮"


def example(blocks: int = 3, name: str = "llama", experts: int = 0) -> Report:
    """A report with everything that a page may show, the same every time."""
    drawn = random.Random(blocks)
    report = Report(
        name, "jsq", seed=5, versions={"torch": "2.13.0", "python": "3.11.7"}, seconds=12.5,
        seconds_by_phase={"compress": 8.25, "load": 1.5}, peak_memory_bytes=600 << 20,
        size_bytes={"before": 12 << 20, "after": 7 << 20}, perplexity={"before": 20.5, "after": 22.25},
        kl_divergence=0.0625, kl_stderr=0.00125, top1_agreement=0.8125,
        calibration={"source": "self", "samples": 8, "length": 64, "seed": 5, "propagate": "compressed"},
        evaluation={"source": "self", "samples": 4, "length": 64, "seed": 6, "sha256": "ab" * 32},
        structure={"target": 0.2, "achieved": 0.1875, "kept per block": {"MLP channels": [48, 64]}},
        recovery={"kind": "full", "steps": 3, "rate": 2e-4, "rows per step": 2, "loss": [0.5, 0.25, 0.125]},
        search={
            "rows": 8, "validation_rows": [0, 4], "start": {"ratios": [0.0], "perplexity": 21.0},
            "best": {"ratios": [4e-5] * blocks, "perplexity": 20.0},
            "moves": [
                {"temperature": 300.0, "block": 0, "ratio": 4e-5, "perplexity": 21.0 - i, "accepted": i != 1,
                 "current": 20.5 - i, "best": 20.0} for i in range(3)
            ],
        },
        warnings=[f"model.layers.{i}.mlp.up_proj: damping raised" for i in range(blocks)], output="somewhere",
    )  # fmt: skip
    for number in range(blocks):
        report.blocks.append(_block(f"model.layers.{number}", drawn, number, experts))
    return report


def _block(name: str, drawn: random.Random, number: int, experts: int) -> BlockReport:
    kinds = dict(KINDS) | {f"mlp.experts.{e}.up_proj": (32, 64) for e in range(experts)}
    block = BlockReport(name, seconds=1 + drawn.random(), peak_memory_bytes=(500 + number) << 20)
    for kind, shape in kinds.items():
        block.matrices.append(
            MatrixReport(f"{name}.{kind}", shape, drawn.random(), 8.0625, 10 ** -(1 + drawn.random()))
        )
        peaks = torch.rand(shape[1], generator=torch.Generator().manual_seed(number)) + 0.5
        peaks[3] *= 50
        smooths = kind.endswith(("q_proj", "up_proj"))
        figures = {
            "clip_ratio": 5e-5,
            "clip_errors": {"0": 0.5, "5e-05": 0.25},
            "rho": 0.0,
            "rho_errors": {"0": 0.25, "0.05": 0.5},
        }
        inputs = described(peaks, peaks.sqrt() if smooths else None)
        block.groups.append(GroupReport(f"{name}.{kind}", smooths, "" if smooths else "no norm", figures, inputs))
    return block


def result(report: Report | None = None, **more: object) -> Result:
    """Of a report, with a command and a recipe."""
    values: dict = {"recipe": "stages:\n- prune: {}\n", "command": "python -m llmcompress --model llama"} | more
    return Result("a folder", example() if report is None else report, **values)


def write(folder: Path, report: Report) -> Path:
    """A folder that holds a report and nothing else."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        tables: by ``data-table`` or ``data-map``, rows of texts.
        parts: by ``data-part``, text.
        attributes: (tag, name, value) of all.
        tags: in order.
        text: all of it, without style.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.parts: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] | None = None
        self._part = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        self._open.append(tag)
        name = found.get("data-table") or found.get("data-map")
        if name:
            self._rows = self.tables[name] = []
        self._part = found.get("data-part", self._part)
        if self._rows is not None and tag in ("tr", "dt"):
            self._rows.append([])
        if self._rows and tag in ("td", "th", "dt", "dd"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "dl"):
            self._rows = None
        if tag == "pre":
            self._part = ""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._part:
            self.parts[self._part] = self.parts.get(self._part, "") + data
        if self._rows and self._rows[-1] and {"td", "th", "dt", "dd"} & set(self._open):
            self._rows[-1][-1] += data
