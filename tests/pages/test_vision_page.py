"""The page of a convolutional network holds the figures of its report, and is safe to open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmcompress.cli import main
from llmcompress.pages.vision_advice import STRONGER, vision_advice
from llmcompress.pages.vision_page import vision_page
from llmcompress.pages.vision_plots import SHOWN, by_layer, layer_pictures
from llmcompress.vision.recipe import VisionRecipe
from llmcompress.vision.report import VisionReport
from tests.pages.reports import HOSTILE, Page
from tests.pages.vision_reports import example


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(vision_page(example(), "stages: []\n", "python -m llmcompress vision"))


def test_the_headline_latency_and_exports_are_the_reports(page: Page) -> None:
    assert page.tables["headline"][1:] == example().headline()
    assert page.tables["latency"][1:] == [
        ["dense, measured", "4.00 ms", "100.0%"], ["target", "2.00 ms", "50.0%"],
        ["predicted", "1.92 ms", "48.0%"], ["measured", "2.08 ms", "52.0%"],
    ]  # fmt: skip
    assert page.tables["exports"][1:] == [["network.onnx", "166.79 KiB", "3.0e-03", "INT8 weights in 16 layers"]]


def test_every_matrix_command_recipe_and_warning_is_there(page: Page) -> None:
    assert [row[0] for row in page.tables["matrices"][1:]] == [m.name for m in example().matrices]
    assert page.parts == {"command": "python -m llmcompress vision", "recipe": "stages: []\n"}
    assert "left dense (3 times)" in page.text and dict(page.tables["facts"])["torch"] == "2.13.0"


def test_every_space_and_layer_has_its_line_and_its_figure(page: Page) -> None:
    for space in example().channels:
        assert f"{space['after']} of {space['before']}" in page.text
    for layer in by_layer(example().matrices):
        assert page.text.count(layer.name) >= 4  # errors, zeros, bits, and the list
        assert f"{100 * layer.sparsity:.3g}" in page.text


def test_the_groups_of_a_convolution_are_one_layer() -> None:
    parts = [m for m in example().matrices if m.name.startswith("stages.2.")]
    layer = next(m for m in by_layer(example().matrices) if m.name == "stages.2.first.0")
    assert layer.shape == (sum(m.shape[0] for m in parts), 144) and layer.weights == sum(m.weights for m in parts)
    assert layer.zeros == pytest.approx(sum(m.zeros for m in parts), abs=1)
    assert layer.relative_error == max(m.relative_error for m in parts)


def test_of_many_layers_those_of_the_largest_errors_are_drawn() -> None:
    report = example(layers=SHOWN + 30)
    svg = layer_pictures(report)[0].svg
    ranked = sorted(by_layer(report.matrices), key=lambda m: -m.relative_error)
    assert all(m.name in svg for m in ranked[:SHOWN]) and not any(m.name in svg for m in ranked[SHOWN:])


def test_a_report_with_little_to_tell_still_has_a_page() -> None:
    found = Page(vision_page(VisionReport("net", "int8")))
    assert found.tables["headline"][1:] == VisionReport("net", "int8").headline()
    assert "latency" not in found.tables and "matrices" not in found.tables


def test_nothing_in_a_report_becomes_markup_and_nothing_is_fetched() -> None:
    source = vision_page(example(layers=2, name=HOSTILE), HOSTILE, HOSTILE)
    found = Page(source)
    assert not {"script", "img", "iframe"} & set(found.tags)
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert all(v.startswith(("#", "data:")) for _, name, v in found.attributes if name in ("href", "src", "xlink:href"))
    assert "{{ 7 * 7 }}" in found.text and not re.search(r"https?://(?!www\.w3\.org)", source)


def test_the_same_report_gives_the_same_page() -> None:
    assert vision_page(example(), "a", "b") == vision_page(example(), "a", "b")


def test_report_writes_the_page_of_a_run_anew_and_refuses_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["vision", "--recipe", "channels", "--samples", "32", "--output", str(out)]
    assert main(line) == 0
    written = (out / "report.html").read_bytes()
    assert main(["report", str(out)]) == 0
    again = (out / "report.html").read_bytes()
    assert Page(again.decode()).tables == Page(written.decode()).tables and again == written
    (out / "report.json").write_text("{}")
    capsys.readouterr()
    assert main(["report", str(out)]) == 2
    error = capsys.readouterr().err
    assert "no report of the command vision can be read" in error and error.count("\n") == 1


def test_lost_channels_are_to_be_recovered_and_small_differences_doubted() -> None:
    report = example()
    report.trainings, report.accuracy = [], {"before": 0.986, "after": 0.3}
    assert [item.command for item in vision_advice(report)] == ["--recover-epochs 8"]
    report.accuracy["after"] = 0.984
    assert [item.command for item in vision_advice(report)] == ["--data FOLDER"]
    report.accuracy["after"] = 0.986
    assert vision_advice(report) == []
    report.recipe, report.accuracy["after"], report.channels = "wanda-50", 0.7, []
    assert [item.command for item in vision_advice(report)] == ["--recipe sparsegpt-50"]


def test_stronger_recipes_for_images_have_the_same_budget() -> None:
    def budget(name: str) -> tuple[object, ...]:
        recipe = VisionRecipe.load(name)
        core, pattern = recipe.core, recipe.core and recipe.core.sparsity
        zeros = str(recipe.scores.sparsity if recipe.scores else pattern)
        bits = recipe.mixed.average if recipe.mixed else core and core.grid and core.grid.bits
        return bits, zeros, recipe.channels and recipe.channels.ratio

    for weak, strong in STRONGER.items():
        assert budget(weak) == budget(strong), (weak, strong)
