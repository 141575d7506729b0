"""What is no checkpoint, or a damaged one, is named in one line before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commands.helpers import UP, Weights


def test_folders_that_hold_no_model_are_refused(
    refusal: Callable[..., str], altered: Callable[..., Path], tmp_path: Path
) -> None:
    assert "nowhere: neither a preset, a folder nor a Hub id" in refusal(model="nowhere")
    assert "lama: neither" in (line := refusal(model="lama")) and "did you mean 'llama'?" in line
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json" in refusal(model=tmp_path / "empty")
    folder = altered()
    (folder / "model.safetensors").unlink()
    assert "altered: no weights (*.safetensors)" in refusal(model=folder)
    (folder / "pytorch_model.bin").touch()
    assert "pickled (pytorch_model.bin)" in (line := refusal(model=folder)) and "only safetensors is read" in line
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "the index names model-1.safetensors, which is not there" in refusal(model=folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refusal(model=folder)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b + b"0"],
    ids=["truncated", "header cut", "empty", "garbage", "overlong"],
)
def test_a_damaged_file_is_named(
    refusal: Callable[..., str], altered: Callable[..., Path], damage: Callable[[bytes], bytes]
) -> None:
    file = altered() / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file}: damaged or truncated safetensors file" in refusal(model=file.parent)


def put(value: float, name: str = UP) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1).__setitem__(3, value)


@pytest.mark.parametrize("calibration", ["self", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    run: Callable[..., tuple[int, str, str]],
    refusal: Callable[..., str],
    altered: Callable[..., Path],
    text: Path,
    value: float,
    calibration: str | None,
) -> None:
    folder = altered(put(value))
    assert UP in refusal("--json", model=folder, calibration=calibration or text)


@pytest.mark.parametrize("calibration", ["self", None])
def test_infinite_activations_name_the_matrix(
    refusal: Callable[..., str], altered: Callable[..., Path], text: Path, calibration: str | None
) -> None:
    folder = altered(lambda weights: weights[UP].fill_(3e38))
    line = refusal("--json", model=folder, calibration=calibration or text)
    assert "NaN or infinite activations" in line and "model.layers.1.mlp." in line


CHECKPOINTS: list[tuple[Callable[[Weights], object] | None, dict[str, object], str]] = [
    (lambda w: w.pop(UP), {}, f"{UP}: the checkpoint lacks this weight"),
    (lambda w: w.pop("model.norm.weight"), {}, "model.norm.weight: the checkpoint lacks this weight"),
    (lambda w: w.update({UP: torch.zeros(3, 32)}), {}, f"{UP}: has the shape (3, 32), config.json says (64, 32)"),
    (lambda w: w.update({UP: w[UP].to(torch.int8)}), {}, f"{UP}: stored as torch.int8"),
    (None, {"model_type": "lama"}, "transformers cannot build this model"),
    (None, {"num_hidden_layers": 0}, "no repeated blocks"),
    (None, {"quantization_config": {"quant_method": "gptq"}}, "is quantized already; give the dense checkpoint"),
]


@pytest.mark.parametrize(("change", "config", "line"), CHECKPOINTS, ids=[line[-30:] for *_, line in CHECKPOINTS])
@pytest.mark.parametrize("calibration", ["self"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_calibration(
    refusal: Callable[..., str],
    altered: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Weights], object] | None,
    config: dict[str, object],
    line: str,
    calibration: str,
) -> None:
    monkeypatch.setattr("llmcompress.run.draw_tokens", None)  # is not reached
    assert line in refusal(model=altered(change, **config), calibration=calibration)
