"""Rows and columns that belong together, on architectures whose names nobody told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.errors import UserError
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.coupling import Coupling, changed_network, removal_error
from llmcompress.model.load import BlockwiseModel
from llmcompress.restructure import couplings
from llmcompress.suspend import gates
from tests.architectures import CONFIGS, tiny_folder

BOTH = ["KV groups", "MLP channels"]
#: OLMo2 normalises over all heads, StableLM, GPT-NeoX and the older ones derive the width of a head from their number
KINDS = dict.fromkeys(CONFIGS, BOTH) | {
    m: ["MLP channels"] for m in ("falcon", "opt", "gpt_neox", "gpt2", "olmo2", "stablelm", "gptj")
}
del KINDS["bloom"]


def opened(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(Checkpoint(folder), torch.float32)


def everything(name: str) -> bool:
    return True


@pytest.mark.parametrize("model_type", KINDS)
def test_coupled_groups_are_found_by_structure(model_type: str, tmp_path: Path) -> None:
    model = opened(tiny_folder(tmp_path, model_type))
    found = couplings(model, everything)
    assert [c.kind.name for c in found] == KINDS[model_type]
    for coupling in found:
        shapes = {p.matrix: model.blocks[0].module.get_submodule(p.matrix).weight.numel() for p in coupling.parts}
        assert coupling.kind.weights * coupling.kind.count == sum(shapes.values())  # every weight in one group
        for part in coupling.parts:
            assert part.index.flatten().sort().values.tolist() == list(range(part.index.numel()))
        assert [p.axis for p in coupling.parts] == [0] * (len(coupling.parts) - 1) + [1]


def test_an_architecture_with_fixed_widths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither heads nor channels"):
        couplings(opened(tiny_folder(tmp_path, "bloom")), everything)


def test_head_counts_are_those_that_the_configuration_allows(tmp_path: Path) -> None:
    """Llama's wants the hidden size to be a multiple of the heads, Qwen2's does not."""
    many = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    llama = couplings(opened(tiny_folder(tmp_path / "llama", "llama", **many)), everything)[0]
    assert list(llama.kind.kept_counts) == [1, 2, 4, 8]
    qwen = couplings(opened(tiny_folder(tmp_path / "qwen2", "qwen2", **many)), everything)[0]
    assert list(qwen.kind.kept_counts) == list(range(1, 9))


def test_one_kv_group_is_never_removed(tmp_path: Path) -> None:
    model = opened(tiny_folder(tmp_path, "llama", num_key_value_heads=1))
    assert [c.kind.name for c in couplings(model, everything)] == ["MLP channels"]


def test_a_kind_with_a_matrix_left_out_stays(tmp_path: Path) -> None:
    model = opened(tiny_folder(tmp_path))
    assert [c.kind.name for c in couplings(model, lambda name: "o_proj" not in name)] == ["MLP channels"]
    with pytest.raises(UserError, match="not targeted"):
        couplings(model, lambda name: "k_proj" not in name and "up_proj" not in name)


def test_a_wrong_coupling_does_not_pass(tmp_path: Path) -> None:
    """Columns of other channels than the rows: what is measured tells."""
    model = opened(tiny_folder(tmp_path))
    right = couplings(model, everything)[1]
    last = right.parts[-1]
    wrong = Coupling(
        right.kind, (*right.parts[:-1], type(last)(last.matrix, last.axis, last.index.flip(0))), right.units
    )
    kept = torch.arange(40)
    network = changed_network(model, right.changes(40))
    assert network is not None
    with torch.no_grad(), gates([b.module for b in model.blocks]):
        (probe,) = model.start_forwards([torch.arange(16)[None]])
        block = model.load_block(0)
        assert removal_error(model, network, block, probe.call, [(right, kept)]) < 1e-6
        assert removal_error(model, network, block, probe.call, [(wrong, kept)]) > 1e-2
