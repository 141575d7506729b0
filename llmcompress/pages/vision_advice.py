"""What to try next with a convolutional network, by rules that are stated with every piece of advice."""

from __future__ import annotations

from llmcompress.pages.advice import Advice
from llmcompress.vision.report import VisionReport

#: a recipe → the one of the same budget that loses less on the bundled networks
STRONGER = {
    "magnitude-50": "magnitude-50-refit", "wanda-50": "sparsegpt-50", "channels": "thinet", "int4": "mixed-int4",
}  # fmt: skip
#: share of the images whose loss is much
MUCH = 0.01


def vision_advice(report: VisionReport) -> list[Advice]:
    """What follows from the figures of a convolutional network, in the order of what it may bring."""
    found = [_train(report), _stronger(report), _more_images(report)]
    return [item for item in found if item is not None]


def _lost(report: VisionReport) -> float:
    """Share of the held-out images that were named right before, less that after; 0 if there are no labels."""
    before, after = report.accuracy["before"], report.accuracy["after"]
    return 0.0 if before is None or after is None else before - after


def _train(report: VisionReport) -> Advice | None:
    if report.trainings or _lost(report) < MUCH or not report.channels:
        return None
    why = f"Channels are gone, {100 * _lost(report):.1f} points with them, and nothing was trained afterwards."
    return Advice("Train what is left for some epochs.", why, "--recover-epochs 8")


def _stronger(report: VisionReport) -> Advice | None:
    better, lost = STRONGER.get(report.recipe), _lost(report)
    if better is None or report.trainings or lost < MUCH:
        return None
    why = (
        f"{100 * lost:.1f} points were lost, at least {100 * MUCH:.0f}, and {better} has the same budget and lost less "
        "where both were measured."
    )
    return Advice(f"Try the recipe {better}.", why, f"--recipe {better}")


def _more_images(report: VisionReport) -> Advice | None:
    number, after = report.data.get("held out", 0), report.accuracy["after"]
    if not number or after is None or not 0 < abs(_lost(report)) < 2 * (error := (after * (1 - after) / number) ** 0.5):
        return None
    why = (
        f"The change of {-100 * _lost(report):+.1f} points is less than twice the standard error of an accuracy on "
        f"{number} images, {100 * error:.1f} points."
    )
    return Advice("Judge on more images before you believe the difference.", why, "--data FOLDER")
