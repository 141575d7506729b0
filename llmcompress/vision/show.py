"""A plan for a terminal."""

from __future__ import annotations

from typing import Any

from llmcompress.table import aligned


def plan_text(plan: dict[str, Any]) -> str:
    """What `VisionRun.plan` found, as a table."""
    layers = [["layer", "out × in", "groups", ""]]
    for layer in plan["layers"]:
        rows, columns = layer["shape"]
        layers.append(
            [layer["name"], f"{rows} × {columns}", str(layer["groups"]), "" if layer["targeted"] else "left dense"]
        )
    images = plan["images"]
    lines = [
        f"{plan['model']}: {images['calibration']} images to calibrate on, {images['held out']} held out",
        aligned(layers),
        f"{plan['norms folded']} norms fold into convolutions"
        + "".join(f"\n  {name} stays: {reason}" for name, reason in plan["norms kept"].items()),
    ]
    spaces = plan.get("spaces")
    if spaces:
        table = [
            ["channels written by", "number", "at once", "kept", "weights of one", "layers that lose them together"]
        ]
        table += [
            [s["name"], *(str(s[key]) for key in ("channels", "together", "kept", "weights")), ", ".join(s["layers"])]
            for s in spaces
        ]
        lines.append(aligned(table))
    lines.append(f"would be written to {plan['output']}")
    return "\n\n".join(lines)
