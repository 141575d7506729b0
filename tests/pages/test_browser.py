"""The pages in a real browser: nothing leaves them, nothing is complained of, and they fit a phone. Skipped where there
is no Chromium; `.ci/run` installs one where it may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcompress.pages.compare_page import compare_page
from llmcompress.pages.frontier import ranked
from llmcompress.pages.report_page import report_page
from llmcompress.pages.results import Result, Speed
from llmcompress.pages.vision_page import vision_page
from tests.pages import vision_reports
from tests.pages.reports import HOSTILE, example, result

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        program = next(filter(None, map(shutil.which, NAMES)), own if os.path.exists(own) else None)
        if program is None:
            pytest.skip("no Chromium on this machine")
        running = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    wide = example(blocks=24, name="organisation/" + "a-very-long-name-of-a-model-" * 6, experts=3)
    speeds = {"decode": Speed(20.0, 10.0)}
    other = example()
    other.kl_divergence = 0.01
    groups = ranked([Result("one", example(), speeds=speeds), Result("b" * 90, other, speeds=speeds)])
    texts = {
        "report": report_page(result(command="python -m llmcompress --model " + "x" * 300)),
        "large": report_page(result(wide)),
        "hostile": report_page(result(example(blocks=1, name=HOSTILE))),
        "compare": compare_page(groups),
        "vision": vision_page(vision_reports.example(layers=70), "a: 1\n", "python -m llmcompress vision " + "x" * 300),
    }
    files = {name: folder / f"{name}.html" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    return files


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["report", "large", "hostile", "compare", "vision"])
def test_a_page_stands_alone_and_fits(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri(), wait_until="networkidle")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    here = pages[name].as_uri()
    assert [url for url in asked if url != here and not url.startswith("data:")] == []
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 250).length"
    assert page.evaluate(small) == 0
    narrow = "[...document.querySelectorAll('table.figures tbody th')].filter(t => t.clientWidth < 90).length"
    assert page.evaluate(narrow) == 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "vision"])
def test_text_can_be_read_in_light_and_in_the_dark(
    browser: Any, pages: dict[str, Path], name: str, scheme: str
) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(pages[name].as_uri())
    low = page.evaluate(_CONTRAST)
    assert low == []
    context.close()


#: every text whose contrast with the first opaque background behind it is below 4.5, SVG's by its fill
_CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] < 0.99 ? null : m; };
  const linear = v => v <= 10.31 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), at = walker.currentNode.parentElement;
    if (!text || at.closest('title, desc, style')) continue;
    const style = getComputedStyle(at);
    const ink = parse(at.closest('svg') ? style.fill : style.color);
    let behind = null;
    for (let e = at; e && !behind; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c.startsWith('rgb')) behind = parse(c);
    }
    if (!ink || !behind) continue;
    const [a, b] = [light(ink), light(behind)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push([text.slice(0, 40), style.color, behind.join()]);
  }
  return low.slice(0, 10);
}"""
