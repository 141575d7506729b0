"""What bitsandbytes makes of a pruned folder loads through transformers and bitsandbytes, zeros kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.core.grid import QuantGrid
from llmcompress.errors import UserError
from llmcompress.export.bitsandbytes import KINDS, to_bitsandbytes
from llmcompress.export.quantized import Scheme
from tests.export.test_quantized import all_but_head, linears_of, save, tiny_llama
from tests.export.test_sparse import prune

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_bitsandbytes_read_it(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(torch.bfloat16)
    prune(model, "50 %")
    model.save_pretrained(tmp_path / "pruned")
    size = to_bitsandbytes(tmp_path / "pruned", tmp_path / "out", kind)
    assert size["after"] < size["before"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held = bitsandbytes.nn.Linear8bitLt if kind.endswith("int8") else bitsandbytes.nn.Linear4bit
    assert sum(isinstance(module, held) for module in loaded.modules()) == len(linears_of(model)) - 1
    tokens = torch.randint(128, (1, 8))
    with torch.no_grad():
        found, expected = loaded(tokens).logits.float(), model(tokens).logits.float()
    assert (found - expected).norm() < (0.1 if kind.endswith("int8") else 0.3) * expected.norm()


def test_zeros_stay_zero_in_nf4(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    prune(model, "2:4")
    model.save_pretrained(tmp_path / "pruned")
    to_bitsandbytes(tmp_path / "pruned", tmp_path / "out", "bitsandbytes-nf4")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert bool((values[model.model.layers[0].mlp.up_proj.weight == 0] == 0).all())


def test_a_quantized_folder_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    save(model, all_but_head(model, Scheme(QuantGrid.parse_weights("int8"))), tmp_path / "quantized")
    with pytest.raises(UserError, match="quantized already"):
        to_bitsandbytes(tmp_path / "quantized", tmp_path / "out", KINDS[0])
    assert not (tmp_path / "out").exists()
