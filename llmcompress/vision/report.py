"""The report of a run on images: ``report.json`` and the terminal's table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from llmcompress.report import MatrixReport
from llmcompress.table import aligned, bytes_text, change, figure, grouped_warnings


@dataclass
class VisionReport:
    """Everything ``report.json`` holds; figures are None or empty where they were not measured.

    Attributes:
        model, recipe, seed, versions: what was run.
        data: source, how many images it was calibrated and judged on.
        accuracy: share of held-out images named right, ``before`` and ``after``; None without labels.
        agreement: share of held-out images that both networks name the same.
        logit_error: ‖after − before‖² / ‖before‖² of the logits.
        parameters: ``before`` and ``after``.
        size_bytes: of the weights on disk, ``before`` and ``after``.
        macs: multiplications for one image, ``before`` and ``after``.
        seconds, seconds_by_phase, peak_memory_bytes: what the run cost.
        fold: pairs folded, norms that stay and why, relative change of the logits.
        equalised: pairs of layers whose ranges were, those refused, relative change of the logits.
        channels: space → names of its layers, channels ``before`` and ``after``; empty without channel pruning.
        latency: of channel removal under a budget of it: seconds of the dense network, and the shares of them that were
            asked for (``target``), ``predicted`` by the table of layers, and ``measured``; empty without one.
        removal_error: relative difference of the smaller network and the one with those channels zeroed.
        mixed: bits by layer, see `llmcompress.vision.mixed.choose_bits`; empty without mixed precision.
        trainings: one after the other: ``what`` was done meanwhile, how, and the mean loss of each epoch.
        matrices: reports of the compressed matrices, in order of execution.
        exports: files for other programs: ``file``, ``bytes``, relative ``difference`` of its logits, the
            ``tolerance`` of that, and what it ``holds``.
        warnings: what was skipped or degraded.
        output: folder.
    """

    model: str
    recipe: str
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, float | None] = field(default_factory=lambda: {"before": None, "after": None})
    agreement: float | None = None
    logit_error: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    size_bytes: dict[str, int | None] = field(default_factory=lambda: {"before": None, "after": None})
    macs: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    fold: dict[str, Any] = field(default_factory=dict)
    equalised: dict[str, Any] = field(default_factory=dict)
    channels: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    removal_error: float | None = None
    mixed: dict[str, Any] = field(default_factory=dict)
    trainings: list[dict[str, Any]] = field(default_factory=list)
    matrices: list[MatrixReport] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the compressed matrices' weights."""
        total = sum(m.weights for m in self.matrices)
        return sum(m.zeros for m in self.matrices) / total if total else None

    @property
    def effective_bits(self) -> float | None:
        """Bits per weight of the compressed matrices, scales included."""
        total = sum(m.weights for m in self.matrices)
        return sum(m.bits * m.weights for m in self.matrices) / total if total else None

    def to_json(self) -> str:
        """Strict JSON."""
        tree = asdict(self) | {"sparsity": self.sparsity, "effective_bits": self.effective_bits}
        return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> VisionReport:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not a report of this kind.
        """
        try:
            tree = json.loads(text)
            for derived in ("sparsity", "effective_bits"):
                tree.pop(derived)
            tree["matrices"] = [MatrixReport(**{**m, "shape": tuple(m["shape"])}) for m in tree["matrices"]]
            return VisionReport(**tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a report on images: {error!r}") from error

    def headline(self) -> list[list[str]]:
        """Rows of name, before, after, change."""
        rows = []
        if self.accuracy["after"] is not None:
            points = (self.accuracy["after"] - (self.accuracy["before"] or 0.0)) * 100
            before, after = (figure(self.accuracy[key], ".2%") for key in ("before", "after"))
            rows.append(["accuracy on held-out images", before, after, f"{points:+.2f} points"])
        if self.agreement is not None:
            rows.append(["same class as the dense network", "", f"{self.agreement:.2%}", ""])
        size = self.size_bytes
        rows.append(["size of the weights", bytes_text(size["before"]), bytes_text(size["after"]), change(size)])
        for name, pair in (("parameters", self.parameters), ("multiplications per image", self.macs)):
            if pair and pair["before"] != pair["after"]:
                rows.append([name, f"{pair['before']:,}", f"{pair['after']:,}", change(pair)])
        if self.latency:
            found, dense = self.latency, self.latency["dense_seconds"]
            before, after = (f"{1e3 * seconds:.2f} ms" for seconds in (dense, found["measured"] * dense))
            said = f"{found['measured']:.0%}; predicted {found['predicted']:.0%}, asked for {found['target']:.0%}"
            rows.append([f"float32 latency of {found['images']} images", before, after, said])
        if self.effective_bits is not None and self.sparsity is not None:
            rows.append(["bits per compressed weight", "32", f"{self.effective_bits:.2f}", ""])
            rows.append(["zeros in compressed weights", "", f"{self.sparsity:.1%}", ""])
        return rows

    def table(self) -> str:
        """The report for a terminal."""
        worst = sorted(self.matrices, key=lambda m: -(m.relative_error or 0.0))[:8]
        layers = [["largest errors", "shape", "error", "zeros", "bits"]]
        layers += [
            [
                m.name,
                f"{m.shape[0]}×{m.shape[1]}",
                figure(m.relative_error, ".2e"),
                f"{m.sparsity:.0%}",
                f"{m.bits:.2f}",
            ]
            for m in worst
        ]
        phases = ", ".join(f"{n} {s:.1f}" for n, s in sorted(self.seconds_by_phase.items(), key=lambda p: -p[1]))
        spaces = [["channels", "before", "after"]]
        spaces += [[s["name"], str(s["before"]), str(s["after"])] for s in self.channels]
        widths = [["mixed precision", "weights", "bits"]]
        widths += [[m["name"], f"{m['weights']:,}", str(m["bits"])] for m in self.mixed.get("layers", [])]
        parts = [
            aligned([[f"{self.model}, {self.recipe}", "before", "after", ""], *self.headline()]),
            aligned(spaces) if self.channels else "",
            aligned(widths) if self.mixed else "",
            aligned(layers) if worst else "",
            "\n".join(
                f"{t['epochs']} epochs of training {t['what']} ({t['learn']}): "
                f"loss {t['loss'][0]:.2e} → {t['loss'][-1]:.2e}"
                for t in self.trainings
            ),
            "\n".join(
                f"{e['file']}: {bytes_text(e['bytes'])}, {e['holds']}; logits differ by {e['difference']:.1e}"
                for e in self.exports
            ),
            f"{self.seconds:.1f} s ({phases}), peak memory {bytes_text(self.peak_memory_bytes)}",
            "\n".join(grouped_warnings(self.warnings)),
            f"written to {self.output}" if self.output else "",
        ]
        return "\n\n".join(part for part in parts if part)
