"""The report of a run: what it cost, what it bought, and what went less well than asked.

``effective_bits`` is the number of stored bits per weight of the compressed matrices, counting what is on disk:
an int8 matrix has 8 bits a weight however many of its codes are zero, and scales and zero points count in.
``sparsity`` is the share of exact zeros among the weights of the compressed matrices; embeddings and head stay out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from textwrap import wrap
from typing import Any

from llmcompress.evaluate.divergence import Divergence
from llmcompress.measure import Phases, peak_memory_bytes, versions
from llmcompress.table import aligned, bytes_text, change, figure, grouped_warnings, rows_text

__all__ = ["BlockReport", "GroupReport", "MatrixReport", "Phases", "Report", "peak_memory_bytes", "versions"]


@dataclass
class MatrixReport:
    """One compressed matrix.

    Attributes:
        name: dotted module name.
        shape: (out, in).
        sparsity: share of exact zeros.
        bits: stored bits per weight, scales included.
        relative_error: ‖(W − Q) X‖² / ‖W X‖² on calibration rows X, or ‖W − Q‖² / ‖W‖² without any; None if it was not
            measured.
        figures: what else is known of it.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    bits: float
    relative_error: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def zeros(self) -> int:
        """How many of them are exactly zero."""
        return round(self.sparsity * self.weights)


@dataclass
class GroupReport:
    """Matrices that read one tensor.

    Attributes:
        name: of the first matrix.
        folded: whether smoothing was folded into the producing norm; None if no stage smooths.
        fold_refusal: why it was not.
        figures: a method's numbers: clip ratio, damping, α.
        inputs: how large they get: ``channels``, profiles ``before`` and ``after`` smoothing (see
            `llmcompress.core.profile`; the second only where there was one) and the ``outlier_ratio`` of each.
    """

    name: str
    folded: bool | None = None
    fold_refusal: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass
class BlockReport:
    """One decoder block; ``peak_memory_bytes`` is the highest memory up to its end."""

    name: str
    seconds: float = 0.0
    matrices: list[MatrixReport] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @staticmethod
    def from_dict(content: dict[str, Any]) -> BlockReport:
        """Reads what ``dataclasses.asdict`` gave."""
        matrices = [MatrixReport(**{**m, "shape": tuple(m["shape"])}) for m in content["matrices"]]
        groups = [GroupReport(**group) for group in content["groups"]]
        return BlockReport(**{**content, "matrices": matrices, "groups": groups})

    @property
    def sparsity(self) -> float:
        """Share of zeros in the block's compressed matrices."""
        return _weighted_mean(self.matrices, "sparsity") or 0.0


@dataclass
class Report:
    """Everything ``report.json`` holds; figures of quality are None where nothing was evaluated.

    Attributes:
        model: preset, folder or Hub id as given.
        recipe: name of the recipe; its full text is saved beside the report.
        seed: of the run.
        versions: of the programs that decide the numbers.
        seconds: wall clock of the run.
        seconds_by_phase: parts of ``seconds``; none is counted twice.
        peak_memory_bytes: see `peak_memory_bytes`.
        size_bytes: weights on disk, ``before`` and ``after``.
        perplexity: per token, ``before`` and ``after``.
        kl_divergence: KL(dense ‖ compressed), nats per token.
        kl_stderr: its standard error over the evaluated rows.
        top1_agreement: share of positions with the same most likely token.
        calibration: source, samples and length of the calibration rows.
        evaluation: the same of the rows that were evaluated on, if any.
        structure: of a step that made matrices smaller: the share of the blocks' weights asked for and removed, and how
            many groups of each kind a block kept; empty if there was none.
        recovery: of the training after it: kind, steps, rate, the divergence from the dense model at every step; empty
            if there was none.
        search: of clip ratios by annealing: ratios and perplexity on the validation rows at the start and at the best,
            numbers of those rows, every move with the perplexity of its candidate, the current one and the best so far;
            empty if there was none.
        sensitivity: of the blocks, where ratios were to be found: the two ratios that each was pruned to alone, the
            divergence at each, numbers of the rows that judged, the ratios that follow; empty if none were to be found.
        blocks: in the order of the forward.
        determinism: what has to be the same for the same bytes.
        warnings: what was skipped or degraded, in plain words.
        savings: where each is real, rows of `llmcompress.savings`.
        output: the folder that was written.
    """

    model: str
    recipe: str
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    size_bytes: dict[str, int | None] = field(default_factory=lambda: {"before": None, "after": None})
    perplexity: dict[str, float | None] = field(default_factory=lambda: {"before": None, "after": None})
    kl_divergence: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, Any] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)
    determinism: str = ""
    warnings: list[str] = field(default_factory=list)
    savings: list[dict[str, str]] = field(default_factory=list)
    output: str = ""

    @property
    def matrices(self) -> list[MatrixReport]:
        """All compressed matrices."""
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def effective_bits(self) -> float | None:
        """Stored bits per weight of the compressed matrices; None if there are none."""
        return _weighted_mean(self.matrices, "bits")

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the compressed matrices' weights; None if there are none."""
        return _weighted_mean(self.matrices, "sparsity")

    def take(self, found: Divergence) -> None:
        """Takes over the figures of an evaluation."""
        self.perplexity = {"before": found.perplexity_before, "after": found.perplexity_after}
        self.kl_divergence, self.kl_stderr = found.kl_divergence, found.kl_stderr
        self.top1_agreement = found.top1_agreement

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and mappings. What is not finite becomes None and is named in the warnings."""
        lost: list[str] = []
        derived = {"effective_bits": self.effective_bits, "sparsity": self.sparsity}
        content: dict[str, Any] = _plain(asdict(self) | derived, "", lost)
        content["warnings"] += [f"{place} is not a finite number" for place in lost]
        return content

    def to_json(self) -> str:
        """Strict JSON: no NaN, no Infinity."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not a report.
        """
        try:
            content = json.loads(text)
            later: dict[str, Any] = {"savings": [], "sensitivity": {}}  # reports of earlier versions have none
            known = {f.name: (later | content)[f.name] for f in fields(Report)}
            known["blocks"] = [BlockReport.from_dict(block) for block in known["blocks"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a report of this program: {error!r}") from error
        return Report(**known)

    def table(self) -> str:
        """The report for a terminal: headline, errors by kind of matrix, cost, warnings."""
        parts = [
            aligned([[f"{self.model}, {self.recipe}", "before", "after", ""], *self.headline()]),
            aligned(_kinds(self.blocks)),
            "\n".join(saving_lines(self.savings)),
            "\n".join(self._cost()),
            "\n".join(grouped_warnings(self.to_dict()["warnings"])),
            f"written to {self.output}; its report.html shows where it was lost" if self.output else "",
        ]
        return "\n\n".join(part for part in parts if part)

    def headline(self) -> list[list[str]]:
        size, perplexity = self.size_bytes, self.perplexity
        rows = [["size of the weights", bytes_text(size["before"]), bytes_text(size["after"]), change(size)]]
        if self.structure:
            asked = f"asked {self.structure['target']:.1%}"
            rows.append(["removed from the blocks' matrices", "", f"{self.structure['achieved']:.2%}", asked])
        if self.effective_bits is not None and self.sparsity is not None:
            rows.append(["bits per compressed weight", "", f"{self.effective_bits:.2f}", ""])
            rows.append(["zeros in compressed weights", "", f"{self.sparsity:.1%}", ""])
        if self.kl_divergence is not None and self.top1_agreement is not None:
            spread = "" if self.kl_stderr is None else f"s.e. {self.kl_stderr:.5f}"
            before, after = (figure(perplexity[key], ".3f") for key in ("before", "after"))
            rows.append(["perplexity per token", before, after, change(perplexity)])
            rows.append(["KL divergence, nats per token", "", figure(self.kl_divergence, ".5f"), spread])
            rows.append(["top-1 agreement", "", f"{self.top1_agreement:.1%}", ""])
        return rows

    def _cost(self) -> list[str]:
        phases = sorted(self.seconds_by_phase.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases)
        lines = [f"{self.seconds:.1f} s" + (f" ({listed})" if listed else "")]
        if self.peak_memory_bytes:
            lines[0] += f", peak memory {bytes_text(self.peak_memory_bytes)}"
        if self.structure:
            kept = ", ".join(f"{n} of {total} {kind}" for kind, (n, total) in self.structure["kept per block"].items())
            lines.append(f"kept in every block: {kept}")
        if self.recovery:
            first, last = self.recovery["loss"][0], self.recovery["loss"][-1]
            lines.append(
                f"recovered in {self.recovery['steps']} steps ({self.recovery['kind']}): "
                f"divergence from the dense model {first:.4f} → {last:.4f} on the rows trained on"
            )
        if self.sensitivity:
            ratios = self.sensitivity["ratios"]
            lines.append(
                f"sparsity by measured sensitivity: {min(ratios):.2f} to {max(ratios):.2f}, "
                f"found on {len(self.sensitivity['validation_rows'])} of {self.sensitivity['rows']} calibration rows"
            )
        if self.search:
            start, best = (figure(self.search[key]["perplexity"], ".4f") for key in ("start", "best"))
            lines.append(
                f"annealed in {len(self.search['moves'])} moves: perplexity {start} → {best} "
                f"on {len(self.search['validation_rows'])} of {self.search['rows']} calibration rows"
            )
        for name, rows in (("calibrated", self.calibration), ("evaluated", self.evaluation)):
            if rows:
                lines.append(f"{name} on {rows_text(rows)}")
        if self.determinism:
            lines.append(f"determinism: {self.determinism}")
        return lines


def saving_lines(savings: list[dict[str, str]]) -> list[str]:
    """Where each saving is real, in lines that fit a terminal."""
    lines = []
    for s in savings:
        where = f"on disk {s['disk']}; in memory {s['memory']}; in time on a CPU {s['cpu']}, on a GPU {s['gpu']}"
        lines += wrap(f"{s['what']}: {where}; served by {s['server']}", 100, subsequent_indent="  ")
    return lines


def _weighted_mean(matrices: list[MatrixReport], attribute: str) -> float | None:
    """Mean over weights, not over matrices."""
    total = sum(m.weights for m in matrices)
    return sum(getattr(m, attribute) * m.weights for m in matrices) / total if total else None


def _plain(value: Any, place: str, lost: list[str]) -> Any:
    """JSON's own types; ``lost`` collects the places of numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{place}.{key}" if place else str(key), lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{i}]", lost) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist(), place, lost)
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(place)
        return None
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _kinds(blocks: list[BlockReport]) -> list[list[str]]:
    """One row per kind of matrix, e.g. all ``mlp.down_proj``: their number, figures, and the worst of them."""
    kinds: dict[str, list[MatrixReport]] = {}
    for block in blocks:
        for matrix in block.matrices:
            kind = re.sub(r"\b\d+\b", "*", matrix.name.removeprefix(block.name + "."))
            kinds.setdefault(kind, []).append(matrix)
    rows = [["matrices", "number", "bits", "zeros", "error", "worst", "in"]] if kinds else []
    for kind, matrices in kinds.items():
        errors = {m.name: m.relative_error for m in matrices if m.relative_error is not None}
        worst = max(errors, key=lambda name: errors[name]) if errors else ""
        place = worst.removesuffix(kind).rstrip(".")
        mean = f"{sum(errors.values()) / len(errors):.1e}" if errors else ""
        zeros, bits = (_weighted_mean(matrices, attribute) or 0.0 for attribute in ("sparsity", "bits"))
        high = f"{errors[worst]:.1e}" if errors else ""
        rows.append([kind, str(len(matrices)), f"{bits:.2f}", f"{zeros:.1%}", mean, high, place or worst])
    return rows
