"""The model card of a compressed folder: what was done, what it cost, how to load it, what not to expect of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from llmcompress.report import Report
from llmcompress.table import bytes_text, figure

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
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        base_model_relation="quantized" if _is_hub_id(base_model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmcompress", *(["compressed-tensors"] if _is_quantized(report) else []), report.recipe],
        **inherited,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed by the recipe {report.recipe}",
        _summary(report, name),
        "## What it cost and what it bought\n\n" + _figures(report),
        f"## How to load it\n\n```python\n{_LOADING}```",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(report, inherited)),
        f"## How it was made\n\n{_origin(report)}\n\n```yaml\n{recipe_yaml.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


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
        rows.append(["KL(dense ‖ compressed), nats per token", "", figure(report.kl_divergence, ".5f")])
        rows.append(["top-1 agreement with the dense model", "", figure(report.top1_agreement, ".1%")])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|")
    evaluation = report.evaluation
    if evaluation:
        lines.append(f"\nMeasured on {_rows(evaluation)}.")
    elif report.kl_divergence is None:
        lines.append("\nThe quality of the result was not evaluated.")
    return "\n".join(lines)


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
    if report.calibration:
        lines.append(f"Calibrated on {_rows(report.calibration)}: text unlike it may suffer more than the figures say.")
    if "license" not in inherited:
        lines.append("No licence was found beside the base model; its terms apply to this one.")
    return lines


def _origin(report: Report) -> str:
    used = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"Seed {report.seed}; {used}. Figures per matrix are in `report.json`."


def _is_quantized(report: Report) -> bool:
    return any(matrix.bits < 16 for matrix in report.matrices)


def _rows(described: dict[str, Any]) -> str:
    source = described["source"]
    text = "the model's own samples" if source == "self" else f"`{Path(str(source)).name}`"
    return f"{text}, {described['samples']} × {described['length']} tokens"


def _is_hub_id(model: str) -> bool:
    """A local path is no use to a reader elsewhere, and the Hub refuses it as a base model."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _inherited(source: str | Path | None) -> dict[str, Any]:
    """Licence and language of the dense model's own card."""
    readme = Path(source) / "README.md" if source is not None else None
    if readme is None or not readme.is_file():
        return {}
    try:
        found = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # a card without readable metadata names no licence
        return {}
    return {key: found[key] for key in _INHERITED if found.get(key)}
