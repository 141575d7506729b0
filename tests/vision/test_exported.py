"""What other programs read says what the network says: torch's exported program, and ONNX run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmcompress.cli import main
from llmcompress.errors import UserError
from llmcompress.vision import VisionRecipe, compress_vision
from llmcompress.vision.exported import FILES, check_exports, export
from llmcompress.vision.images import digits

PIXELS = digits().calibration(64, 0).pixels
#: (weights, activations) → what the weights are in an ONNX file; 9, 36 and 288 inputs
GRIDS = {
    ("int8", "int8-static-asym"): "INT8", ("int8-asym", "int8-static"): "INT8", ("int4-g9", None): "INT4",
    ("int4-asym", None): "INT4", ("int8", "int4-static-asym"): "INT8", ("fp8", None): "FLOAT8E4M3FN",
}  # fmt: skip


def rounded(weights: str, activations: str | None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    ).eval()
    step = {"method": "rtn", "weights": weights} | ({"activations": activations} if activations else {})
    return compress_vision(net, PIXELS.split(32), VisionRecipe.from_tree({"stages": [{"quantize": step}]}, "t")).module


def run_onnx(file: Path, x: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("weights", "activations"), GRIDS, ids=str)
def test_onnx_holds_the_codes_and_says_what_the_network_says(
    weights: str, activations: str | None, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    net = rounded(weights, activations)
    found = export("onnx", net, PIXELS[:8], tmp_path)
    kind = GRIDS[weights, activations]
    assert found["holds"] == f"{kind} weights in 3 layers"
    graph = onnx.load(tmp_path / "network.onnx").graph
    held = {t.name: t for t in graph.initializer}
    code = getattr(onnx.TensorProto, kind)
    codes = {name: t for name, t in held.items() if name.endswith(".codes")}
    assert len(codes) == 3 and all(t.data_type == code for t in codes.values())
    assert not any(name.endswith(".weight") for name in held)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == (3 if activations else 0)
    with torch.no_grad():
        assert difference(run_onnx(tmp_path / "network.onnx", PIXELS[8:29]), net(PIXELS[8:29])) <= found["tolerance"]
    if kind == "INT8":
        stored = onnx.numpy_helper.to_array(codes["network.2.codes"])
        assert (stored.reshape(8, 36) == net[2].rounding.weight.codes.numpy()).all()


@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8-static-asym"), ("int4-asym", None)], ids=str)
def test_a_program_holds_the_codes_and_computes_the_very_same(
    weights: str, activations: str | None, tmp_path: Path
) -> None:
    net = rounded(weights, activations)
    found = export("program", net, PIXELS[:8], tmp_path)
    program = torch.export.load(tmp_path / "network.pt2")
    state = program.state_dict
    assert not any(name.endswith(".weight") for name in state) and state["network.2.codes"].dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(program.module()(PIXELS[8:29]), net(PIXELS[8:29]), rtol=1e-6, atol=1e-6)
    assert found["difference"] <= 1e-6
    assert "llmcompress" not in str(program.graph_module.code)


def test_a_file_that_says_something_else_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = rounded("int8", "int8-static")
    monkeypatch.setattr("llmcompress.vision.exported._program_logits", _wrong)
    with pytest.raises(UserError, match=r"network.pt2: not written: its logits differ by 1.0e\+00"):
        export("program", net, PIXELS[:8], tmp_path)
    assert not list(tmp_path.iterdir())


def _wrong(program: object, x: Tensor, file: Path) -> Tensor:
    file.write_bytes(b"")
    return torch.zeros(len(x), 10)


def test_what_cannot_be_traced_is_refused_before_any_work() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(UserError, match=r"torch.export cannot trace it"):
        check_exports(("program",), Net().eval(), PIXELS[:4])


def test_without_the_extra_an_onnx_file_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmcompress.vision.exported.NEEDED", ("onnx_that_is_not_there",))
    arguments = ["vision", "--samples", "16", "--output", str(tmp_path / "out"), "--export"]
    assert main([*arguments, "onnx"]) == 2
    assert "onnx_that_is_not_there not installed; pip install 'llmcompress[onnx]'" in capsys.readouterr().err
    assert main([*arguments, "onxn"]) == 2
    assert f"did you mean 'onnx'? known: {', '.join(sorted(FILES))}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
