"""What is shown while a run works, on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import io

import pytest

from llmcompress import progress as progress_module
from llmcompress.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def walk(progress: Progress, blocks: int = 3) -> None:
    with progress:
        progress.total_blocks = blocks
        with progress.phase("sampling the model", 4, "token") as advance:
            for _ in range(4):
                advance(1)
        for i in range(blocks):
            progress.begin_block(f"model.layers.{i}")
            progress.matrix(f"model.layers.{i}.self_attn.q_proj", 0.012)
            progress.matrix(f"model.layers.{i}.mlp.down_proj", 0.034)
            progress.matrix(f"model.layers.{i}.mlp.up_proj", None)
            progress.end_block(0.5)


def test_elsewhere_there_is_one_plain_line_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(clock))
    stream = io.StringIO()
    walk(Progress(stream=stream))
    assert stream.getvalue().splitlines() == [
        "sampling the model: 1.0 s",
        "block 1/3 layers.0: 1.0 s, worst mlp.down_proj error 3.4e-02, 50.0% zeros, remaining 2.0 s",
        "block 2/3 layers.1: 1.0 s, worst mlp.down_proj error 3.4e-02, 50.0% zeros, remaining 1.5 s",
        "block 3/3 layers.2: 1.0 s, worst mlp.down_proj error 3.4e-02, 50.0% zeros, remaining 0.0 s",
    ]


def test_a_terminal_gets_one_bar_with_the_matrix_and_its_error() -> None:
    stream = Terminal()
    walk(Progress(stream=stream))
    shown = stream.getvalue()
    assert "3/3" in shown and "layers.2" in shown and "mlp.down_proj 3.4e-02" in shown
    assert "block 1/3" not in shown


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    walk(Progress(silent=True))
    assert capsys.readouterr() == ("", "")


def test_a_failing_run_closes_its_bar() -> None:
    stream = Terminal()
    with contextlib.suppress(KeyError), Progress(total_blocks=2, stream=stream) as progress:
        progress.begin_block("h.0")
        raise KeyError
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (119.4, "119 s"), (278, "4.6 min"), (1500, "25 min"), (7560, "2.1 h")],
)
def test_a_duration_is_told_in_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert progress_module.seconds_text(seconds) == text
