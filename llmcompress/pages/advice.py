"""What to try next, by rules that are stated with every piece of advice: a figure, the bound it is compared with, and a
command. Nothing here is measured again, and no advice is a promise."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from statistics import median

from llmcompress.report import MatrixReport, Report

#: a recipe → the one of the same budget that loses less on the models this program was measured on
STRONGER = {
    "rtn-w8a8": "smoothquant-w8a8", "smoothquant-w8a8": "smoothquant-gptq-w8a8", "gptq-w8a8": "smoothquant-gptq-w8a8",
    "smoothquant-w6a6": "jsq-plus-w6a6", "omniquant-w6a6": "jsq-plus-w6a6",
    "awq-w4a16": "gptq-best-w4a16", "omniquant-w4a16": "gptq-best-w4a16", "gptq-w4a16": "gptq-best-w4a16",
    "gptq-w3a16": "gptq-best-w3a16",
    "magnitude-50": "sparsegpt-50", "wanda-50": "sparsegpt-50", "sparsegpt-50": "sparsegpt-best-50",
    "wanda-2of4": "sparsegpt-2of4", "sparsegpt-2of4": "sparsegpt-best-2of4", "wanda-4of8": "sparsegpt-4of8",
    "jsq": "jsq-plus", "jsq-gptq": "jsq-plus", "obr": "jsq-plus", "wanda-smoothquant": "jsq-plus",
    "sparsegpt-smoothquant": "jsq-plus",
    "jsq-2of4": "jsq-plus-2of4", "wanda-smoothquant-2of4": "jsq-plus-2of4",
    "sparsegpt-smoothquant-2of4": "jsq-plus-2of4",
    "jsq-4of8": "jsq-plus-4of8", "wanda-smoothquant-4of8": "jsq-plus-4of8",
    "sparsegpt-smoothquant-4of8": "jsq-plus-4of8",
}  # fmt: skip
#: a divergence above the first is much, below the second little
MUCH, LITTLE = 0.05, 0.005
#: how far a matrix's error lies above the median to stand out, and how many are named
STANDS_OUT, NAMED = 2.5, 3
#: an outlier ratio of inputs that are rounded and not smoothed
OUTLIERS = 20.0
#: calibration tokens below which more are suggested
FEW_TOKENS = 16384
#: share of the divergence that its standard error may be
UNSURE = 0.1


@dataclass(frozen=True)
class Advice:
    """One thing to try: ``what``, the rule it follows from, and the arguments to add, if there are any."""

    what: str
    why: str
    command: str = ""


def advice(report: Report) -> list[Advice]:
    """What follows from the figures, in the order of what it may bring."""
    found = [
        _evaluate(report), _more_tokens(report), _stronger(report), _spare(report), _smooth(report), _recover(report),
        _own_text(report), _go_further(report), _more_judged(report),
    ]  # fmt: skip
    return [item for item in found if item is not None]


def outstanding(report: Report) -> list[tuple[MatrixReport, float]]:
    """The matrices of the largest errors, with the error over the median one, where that is STANDS_OUT or more."""
    known = [m for m in report.matrices if m.relative_error]
    if len(known) < 4:
        return []
    middle = median(m.relative_error or 0.0 for m in known)
    ratios = [(m, (m.relative_error or 0.0) / middle) for m in known]
    return sorted([pair for pair in ratios if pair[1] >= STANDS_OUT], key=lambda pair: -pair[1])[:NAMED]


def _evaluate(report: Report) -> Advice | None:
    if report.kl_divergence is not None:
        return None
    return Advice(
        "Judge the result.", "No divergence from the dense model was measured in this run.", "leave out --no-eval"
    )


def _stronger(report: Report) -> Advice | None:
    better = STRONGER.get(report.recipe)
    if better is None or report.kl_divergence is None or report.kl_divergence < LITTLE:
        return None
    why = (
        f"KL {report.kl_divergence:.4f} is at least {LITTLE}, and {better} has the same budget and lost less where "
        "both were measured, on 64 × 512 calibration tokens."
    )
    return Advice(f"Try the recipe {better}.", why, f"--recipe {better}")


def _spare(report: Report) -> Advice | None:
    worst = outstanding(report)
    if not worst or report.effective_bits is None or (report.kl_divergence or MUCH) < LITTLE:
        return None
    names = [m.name for m, _ in worst]
    share = sum(m.weights for m, _ in worst) / sum(m.weights for m in report.matrices)
    listed = ", ".join(f"{m.name} ({ratio:.1f} × the median error)" for m, ratio in worst)
    those = "matrix" if len(worst) == 1 else "matrices"
    return Advice(
        f"Leave the {those} with the largest errors dense: {share:.1%} of the weights.",
        f"An error of {STANDS_OUT} × the median or more stands out: {listed}.",
        "--set " + shlex.quote(f"targets.exclude=[{', '.join(names)}]"),
    )


def _smooth(report: Report) -> Advice | None:
    if any(g.folded is not None for b in report.blocks for g in b.groups) or "w8a8" not in report.recipe:
        return None
    ratios = [g.inputs.get("outlier_ratio", {}).get("before", 0.0) for b in report.blocks for g in b.groups]
    if max(ratios, default=0.0) < OUTLIERS:
        return None
    why = (
        f"An input's largest channel is {max(ratios):.0f} × its median one, at least {OUTLIERS:.0f} ×, and nothing "
        "smooths it."
    )
    return Advice("Smooth the inputs.", why, "--recipe smoothquant-w8a8")


def _recover(report: Report) -> Advice | None:
    if not report.structure or report.recovery:
        return None
    why = f"{report.structure['achieved']:.1%} of the blocks' weights were removed, and nothing was trained afterwards."
    return Advice("Train what is left for some steps.", why, "--recover-steps 200")


def _tokens(report: Report) -> int:
    return int(report.calibration.get("samples", 0) * report.calibration.get("length", 0))


def _more_tokens(report: Report) -> Advice | None:
    tokens = _tokens(report)
    if not 0 < tokens < FEW_TOKENS or (report.kl_divergence or MUCH) < LITTLE:
        return None
    why = f"Calibrated on {tokens} tokens, fewer than {FEW_TOKENS}: the stronger a method, the more it needs."
    return Advice("Calibrate on more tokens.", why, f"--samples {-(-2 * FEW_TOKENS // report.calibration['length'])}")


def _own_text(report: Report) -> Advice | None:
    tokens, kl = _tokens(report), report.kl_divergence or MUCH
    if tokens < FEW_TOKENS or kl < LITTLE or report.calibration.get("source") != "self":
        return None
    why = f"KL is at least {LITTLE}, and the calibration rows are the model's own samples."
    return Advice("Calibrate on text like that of its later use.", why, "--calibration FILE.txt")


def _go_further(report: Report) -> Advice | None:
    if report.kl_divergence is None or report.kl_divergence >= LITTLE:
        return None
    why = f"KL {report.kl_divergence:.5f} is below {LITTLE}: there is room for a smaller budget."
    bits = report.effective_bits or 0.0
    smaller = "gptq-best-w4a16" if bits > 6 else "gptq-best-w3a16" if bits > 3.5 else ""
    return Advice("Try a smaller budget.", why, f"--recipe {smaller}") if smaller else None


def _more_judged(report: Report) -> Advice | None:
    kl, spread = report.kl_divergence, report.kl_stderr
    if kl is None or spread is None or kl < 1e-6 or spread <= UNSURE * kl:
        return None
    why = f"The standard error of KL is {spread / kl:.0%} of it, more than {UNSURE:.0%}."
    return Advice("Judge on more text.", why, "--eval-text FILE.txt")
