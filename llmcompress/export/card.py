"""The model card of a compressed folder: what was done, what it cost, how to load it, what not to expect of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmcompress.report import Report
from llmcompress.resources import model_presets
from llmcompress.savings import COLUMNS, Saving
from llmcompress.table import bytes_text, figure, grouped_warnings

_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(report: Report, recipe_yaml: str, base_model: str, source: str | Path | None = None) -> str:
    """README.md of the result.

    Args:
        report: of the run.
        recipe_yaml: the recipe as it was run.
        base_model: preset, folder or Hub id of the dense model.
        source: the dense model's folder; licence and language are taken over from its README.md, if it names them.
    """
    inherited = _inherited(source)
    name = Path(base_model).name
    data = metadata(report, base_model, inherited)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed by the recipe {report.recipe}",
        _summary(report, name),
        "## What it cost and what it bought\n\n" + _figures(report),
        "## Data\n\n" + _data(report),
        f"## How to load it\n\n```python\n{_LOADING}```" + _needs(report),
        "## Where the savings are real\n\n" + _savings(report),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(report, inherited)),
        f"## How it was made\n\n{_origin(report)}\n\n```yaml\n{recipe_yaml.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def metadata(report: Report, base_model: str, inherited: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads: relation to the dense model, data, licence, and the figures as its ``model-index``.

    Args:
        report: of the run.
        base_model: preset, folder or Hub id of the dense model.
        inherited: ``license`` and others of the dense model's own card.
    """
    hub_id = _hub_id(base_model)
    source = str(report.calibration.get("source", ""))
    quantized = _is_quantized(report)
    return ModelCardData(
        base_model=hub_id,
        base_model_relation="quantized" if hub_id and quantized else None,
        datasets=[_data_set(source)] if _data_set(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmcompress", *(["compressed-tensors"] if quantized else []), report.recipe],
        model_name=Path(report.output).name or f"{Path(base_model).name}-{report.recipe}",
        eval_results=_results(report) or None,
        **inherited,
    )


def metrics(report: Report) -> dict[str, float]:
    """The figures of quality by the name they have in the card's metadata; none if nothing was evaluated."""
    found = {
        "perplexity": report.perplexity["after"],
        "kl_divergence": report.kl_divergence,
        "top1_agreement": report.top1_agreement,
    }
    return {kind: value for kind, value in found.items() if value is not None}


_METRIC_NAMES = {
    "perplexity": "perplexity per token",
    "kl_divergence": "KL(dense ‖ compressed), nats per token",
    "top1_agreement": "top-1 agreement with the dense model",
}


def _results(report: Report) -> list[EvalResult]:
    evaluation = report.evaluation
    if not evaluation:
        return []
    source = str(evaluation["source"])
    arguments: dict[str, Any] = {key: evaluation[key] for key in ("samples", "length", "seed") if key in evaluation}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=_data_set(source) or ("self" if source == "self" else "text"),
            dataset_name="the dense model's own samples" if source == "self" else Path(source).name,
            dataset_args=arguments,
            metric_type=kind,
            metric_name=_METRIC_NAMES[kind],
            metric_value=value,
        )
        for kind, value in metrics(report).items()
    ]


_LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""


def _summary(report: Report, name: str) -> str:
    bits, zeros = report.effective_bits, report.sparsity
    if bits is None or zeros is None:
        return f"`{name}` with no matrix changed."
    matrices = len(report.matrices)
    text = f"{matrices} matrices at {bits:.2f} stored bits per weight, {zeros:.1%} of their weights zero."
    if not report.structure:
        return f"`{name}` with {text}"
    kept = ", ".join(f"{n} of {total} {kind}" for kind, (n, total) in report.structure["kept per block"].items())
    trained = f" It was then trained for {report.recovery['steps']} steps." if report.recovery else ""
    removed = f"{report.structure['achieved']:.1%} of its blocks' weights removed"
    return f"`{name}` with {removed} and {text} Every block keeps {kept}.{trained}"


def _figures(report: Report) -> str:
    size, perplexity = report.size_bytes, report.perplexity
    rows = [["", "before", "after"]]
    rows.append(["size of the weights", bytes_text(size["before"]), bytes_text(size["after"])])
    if report.kl_divergence is not None or perplexity["after"] is not None:
        rows.append(["perplexity per token", *(figure(perplexity[key], ".3f") for key in ("before", "after"))])
        spread = "" if report.kl_stderr is None else f" ± {report.kl_stderr:.5f}"
        rows.append(["KL(dense ‖ compressed), nats per token", "", figure(report.kl_divergence, ".5f") + spread])
        rows.append(["top-1 agreement with the dense model", "", figure(report.top1_agreement, ".1%")])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---:|---:|")
    evaluation = report.evaluation
    if evaluation:
        own = " These are not figures of a benchmark: the text is what the dense model itself writes."
        told = own if evaluation["source"] == "self" else ""
        lines.append(f"\nMeasured on {_rows(evaluation)}, on the folder as it was written, read back.{told}")
    elif report.kl_divergence is None:
        lines.append("\nThe quality of the result was not evaluated.")
    return "\n".join(lines)


def _data(report: Report) -> str:
    rows = [["", "text", "rows", "tokens per row", "tokens", "seed"]]
    for purpose, described in (("calibration", report.calibration), ("evaluation", report.evaluation)):
        if described.get("samples"):
            samples, length = described["samples"], described["length"]
            cells = [_source(described), samples, length, samples * length, described.get("seed", "")]
            rows.append([purpose, *(str(cell) for cell in cells)])
    if len(rows) == 1:
        return "No data was used."
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---:|---:|---:|---:|")
    if report.calibration.get("source") == "self":
        lines.append(
            "\nThe model's own samples are drawn from the dense model with the seed; no outside text was used."
        )
    return "\n".join(lines)


def _needs(report: Report) -> str:
    return "\n\nIt takes `pip install transformers compressed-tensors`." if _is_quantized(report) else ""


def _savings(report: Report) -> str:
    """The rows of `llmcompress.savings` as a table."""
    if not report.savings:
        return "Nothing was made smaller."
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(Saving(**saving).cells for saving in report.savings)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _limits(report: Report, inherited: dict[str, Any]) -> list[str]:
    lines = ["The base model's limits and biases hold here too, and compression can shift them in ways not measured."]
    if report.sparsity:
        lines.append(
            "Zeros are stored like other weights and give no speed on a CPU; only quantization makes the weights "
            "smaller here."
        )
    if _is_quantized(report):
        lines.append(
            "transformers turns quantized weights back into floating point to compute; only a runtime with integer "
            "kernels is faster than the dense model."
        )
    if report.calibration.get("samples"):
        lines.append(f"Calibrated on {_rows(report.calibration)}: text unlike it may suffer more than the figures say.")
    if "license" not in inherited:
        lines.append("No licence was found beside the base model; its terms apply to this one.")
    return lines + [line.removeprefix("warning: ") for line in grouped_warnings(report.warnings)]


def _origin(report: Report) -> str:
    used = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"Seed {report.seed}; {used}. Figures per matrix are in `report.json`."


def _is_quantized(report: Report) -> bool:
    return any(matrix.bits < 16 for matrix in report.matrices)


def _rows(described: dict[str, Any]) -> str:
    return f"{_source(described)}, {described['samples']} × {described['length']} tokens"


def _source(described: dict[str, Any]) -> str:
    source = str(described["source"])
    if source == "self":
        return "the model's own samples"
    return f"`{source if _data_set(source) else Path(source).name}`"


def _data_set(source: str) -> str:
    """The Hub id of ``NAME:config:split``; empty for the model's own samples and for files, which say nothing to a
    reader elsewhere."""
    name = source.partition(":")[0]
    if name.endswith((".txt", ".jsonl", ".safetensors")):
        return ""
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else ""


def _hub_id(model: str) -> str | None:
    """A local path is no use to a reader elsewhere, and the Hub refuses it as a base model."""
    preset = model_presets().get(model)
    location = str(preset.location) if preset else model
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", location) or Path(location).exists():
        return None
    return location


def _inherited(source: str | Path | None) -> dict[str, Any]:
    """Licence and language of the dense model's own card."""
    if source is None:
        return {}
    readme, found = Path(source) / "README.md", {}
    if readme.is_file():
        try:
            found = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
            found = {}  # a card without readable metadata names no licence
    texts = sorted(path.name for path in Path(source).glob("LICENSE*") if path.is_file())
    found = {key: found[key] for key in _INHERITED if _is_plain(found.get(key))}
    if "license" not in found and texts:  # its text is copied into the result
        found |= {"license": "other", "license_name": "license-of-the-base-model", "license_link": texts[0]}
    return found


def _is_plain(value: object) -> bool:
    """A word or several: what may be taken over from a card that anyone may have written."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and 0 < len(word) < 200 for word in words)
