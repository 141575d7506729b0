"""2:4 weights are held as torch's semi-structured tensors where GPU and pattern allow it; elsewhere it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.core.sparsity import Sparsity
from llmcompress.errors import UserError
from llmcompress.export.quantized import Scheme
from llmcompress.runtime import semi_structured
from llmcompress.runtime.loading import load, runtime_of
from llmcompress.runtime.semi_structured import why_not_semi_structured
from tests.export.test_quantized import all_but_head, linears_of, save, tiny_llama
from tests.runtime.test_loading import A, W

AMPERE = (8, 0)


def pruned(pattern: str, rows: int = 64, columns: int = 128) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (weight * Sparsity.parse(pattern).keep_mask(weight.abs())).to(torch.bfloat16)


def test_the_pattern_the_shape_the_dtype_and_the_device_decide() -> None:
    weight = pruned("2:4")
    assert why_not_semi_structured(weight, AMPERE) == why_not_semi_structured(weight, (9, 0)) == ""
    assert "CUDA device" in why_not_semi_structured(weight, None)
    assert "8.0 or newer, this one has 7.5" in why_not_semi_structured(weight, (7, 5))
    assert "float32" in why_not_semi_structured(weight.float(), AMPERE)
    assert "multiples" in why_not_semi_structured(pruned("2:4", 48), AMPERE)
    assert "more than two of four" in why_not_semi_structured(pruned("4:8"), AMPERE)
    spoilt = weight.clone()
    spoilt[17, 44:48] = 1
    assert "more than two of four" in why_not_semi_structured(spoilt, AMPERE)


def test_without_a_gpu_it_is_refused_and_quantized_folders_are_too(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    save(model, all_but_head(model, Scheme(W("int8"), A("int8"))), tmp_path / "int8")
    with pytest.raises(UserError, match="2:4 products want a CUDA device"):
        load(tmp_path / "dense", runtime="2:4")
    with pytest.raises(UserError, match="is quantized"):
        load(tmp_path / "int8", runtime="2:4")


def test_only_linears_with_the_pattern_are_handed_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's class exists on CUDA only, so a stand-in notes what it is given."""
    model = tiny_llama(torch.bfloat16)
    for name, linear in linears_of(model).items():
        if "down_proj" not in name:
            linear.weight.data = pruned("2:4", *linear.weight.shape)
    model.save_pretrained(tmp_path / "pruned")
    given: list[torch.Size] = []
    monkeypatch.setattr(semi_structured, "_capability", lambda device: AMPERE)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda w: given.append(w.shape) or w)
    with pytest.warns(UserWarning, match="2 matrices dense: it keeps more than two of four"):
        loaded = load(tmp_path / "pruned", runtime="2:4")
    assert runtime_of(loaded).kernels == {"2:4": 12, "dense": 2}
    assert len(given) == 12 and (128, 256) not in given  # nor the head, which is outside the blocks
