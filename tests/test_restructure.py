"""Structured pruning, held to what it leaves: smaller matrices that compute what zeroing computes, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress import Recipe, api, compress, load
from llmcompress.core.structure import keep_highest
from llmcompress.errors import UserError
from llmcompress.methods.llm_pruner import LLMPruner
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.progress import Progress
from llmcompress.restructure import couplings, score_groups
from llmcompress.source import Source, draw_tokens
from tests.architectures import tiny_folder, tiny_model

TOKENS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))


def recipe(sparsity: float = 0.4, stages: tuple[dict[str, Any], ...] = (), **keys: Any) -> Recipe:
    prune = {"prune": {"method": "llm_pruner", "sparsity": sparsity, "multiple": 8, "length": 16, **keys}}
    return Recipe.from_tree({"stages": [prune, *stages]}, "smaller")


def options(**given: Any) -> api.Options:
    return api.Options(**{"samples": 4, "length": 16, "evaluate": False} | given)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def matrices(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)


# --- removing is zeroing ---


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "falcon"])
def test_removing_groups_gives_the_logits_of_zeroing_them(model_type: str, tmp_path: Path) -> None:
    """The dense model of transformers, its reading matrices zeroed where a group of the oracle scores goes."""
    source = tiny_folder(tmp_path / "dense", model_type)
    report = compress(source, recipe(), tmp_path / "out", options())
    model = BlockwiseModel(Checkpoint(source), torch.float32)
    found = couplings(model, lambda name: True)
    rows = draw_tokens(Source(source, options()), options().samples, Progress(silent=True))[0]
    scores = score_groups(model, LLMPruner(0.4), found, rows)
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    for coupling, score in zip(found, scores, strict=True):
        width, _ = report.structure["kept per block"][coupling.kind.name]
        for block, kept in zip(model.blocks, keep_highest(score, width), strict=True):
            gone = sorted(set(range(coupling.kind.count)) - set(kept.tolist()))
            reader = dense.get_submodule(f"{block.name}.{coupling.parts[-1].matrix}")
            columns = coupling.parts[-1].index[gone].flatten()
            reader.weight.data.index_fill_(0 if model_type == "gpt2" else 1, columns, 0.0)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(smaller), logits(dense), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_stated_share_is_gone_and_widths_are_uniform(model_type: str, sparsity: float, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", model_type)
    report = compress(source, recipe(sparsity), tmp_path / "out", options())
    dense, smaller = (AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "out"))
    assert 1 - matrices(smaller) / matrices(dense) == pytest.approx(report.structure["achieved"], abs=1e-12)
    assert 0 < report.structure["achieved"] <= sparsity
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    channels, heads = config["intermediate_size"], config["num_key_value_heads"]
    assert channels % 8 == 0 and config["num_attention_heads"] == 2 * heads and config["head_dim"] == 8
    for layer in smaller.model.layers:
        assert layer.mlp.down_proj.weight.shape == (32, channels) and layer.mlp.up_proj.weight.shape == (channels, 32)
        assert layer.self_attn.q_proj.weight.shape == layer.self_attn.o_proj.weight.T.shape == (16 * heads, 32)
        assert layer.self_attn.v_proj.weight.shape == (8 * heads, 32)
    assert (report.size_bytes["after"] or 0) == 4 * sum(
        p.numel() for n, p in smaller.named_parameters() if n != "lm_head.weight" or not config["tie_word_embeddings"]
    )


# --- importance ---


@pytest.mark.parametrize("taylor", ["element", "vector", "second", "mixed"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_scores_are_those_of_autograd_on_the_whole_model(model_type: str, taylor: str, tmp_path: Path) -> None:
    """Loops over heads and channels of the named matrices, with gradients of the whole model."""
    source = tiny_folder(tmp_path, model_type)
    blockwise = BlockwiseModel(Checkpoint(source), torch.float32)
    method = LLMPruner(0.2, taylor=taylor)  # type: ignore[arg-type]
    heads, channels = score_groups(blockwise, method, couplings(blockwise, lambda name: True), TOKENS)
    model = tiny_model(model_type)
    each = []
    for row in TOKENS:
        loss = nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:])
        each.append(torch.autograd.grad(loss, list(model.parameters())))
    mean = {n: sum(g) / 3 for (n, _), g in zip(model.named_parameters(), zip(*each, strict=True), strict=True)}
    second = {
        n: sum(x.square() for x in g) / 3
        for (n, _), g in zip(model.named_parameters(), zip(*each, strict=True), strict=True)
    }

    def lines(name: str, where: slice, columns: bool = False) -> float:
        w, g, squares = (t[name].detach().double() for t in (dict(model.named_parameters()), mean, second))
        w, g, squares = (t.view(len(t), -1)[where] if not columns else t[:, where].T for t in (w, g, squares))
        return float(
            {
                "element": (w * g).abs().sum(),
                "vector": (w * g).sum(1).abs().sum(),
                "second": (w.square() * squares).sum(),
                "mixed": (w * g - w.square() * squares / 2).abs().sum(),
            }[taylor]
        )

    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for j in range(2):
            total = lines(f"{attention}.o_proj.weight", slice(16 * j, 16 * j + 16), columns=True)
            for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
                where = slice(width * j, width * (j + 1))
                total += lines(f"{attention}.{name}.weight", where)
                total += lines(f"{attention}.{name}.bias", where) if model_type == "qwen2" else 0
            assert heads[i, j].item() == pytest.approx(total, rel=1e-3)
        for j in range(64):
            total = lines(f"{mlp}.down_proj.weight", slice(j, j + 1), columns=True)
            total += sum(lines(f"{mlp}.{name}.weight", slice(j, j + 1)) for name in ("gate_proj", "up_proj"))
            assert channels[i, j].item() == pytest.approx(total, rel=1e-3)


def test_unimportant_groups_cost_less_than_random_ones(tmp_path: Path) -> None:
    """Rise of the loss on the rows the scores are taken on, channels alone, over ten random models."""
    chosen = random = 0.0
    for seed in range(10):
        source = tiny_folder(tmp_path / str(seed), seed=seed)
        blockwise = BlockwiseModel(Checkpoint(source), torch.float32)
        found = couplings(blockwise, lambda name: True)
        score = score_groups(blockwise, LLMPruner(0.2), found, TOKENS)[1]
        noise = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed))
        dense = logits(tiny_model("llama", seed)).log_softmax(-1)
        for kept, which in ((keep_highest(score, 44), "chosen"), (keep_highest(noise, 44), "random")):
            model = tiny_model("llama", seed)
            for layer, stay in zip(model.model.layers, kept, strict=True):
                gone = [c for c in range(64) if c not in stay.tolist()]
                layer.mlp.down_proj.weight.data[:, gone] = 0
            divergence = float((dense.exp() * (dense - logits(model).log_softmax(-1))).sum(-1).mean())
            chosen, random = (chosen + divergence, random) if which == "chosen" else (chosen, random + divergence)
    assert chosen < 0.8 * random


# --- with other stages ---


def test_later_stages_work_on_the_smaller_model(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense")
    stages = ({"smooth": {"alpha": 0.8}}, {"quantize": {"weights": "int8", "activations": "int8"}})
    report = compress(source, recipe(stages=stages), tmp_path / "out", options(evaluate=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] < 64 and "quantization_config" in config
    assert report.effective_bits is not None and report.effective_bits < 10
    assert report.kl_divergence is not None and report.kl_divergence > 0
    smaller = compress(source, recipe(), tmp_path / "dense-smaller", options())
    assert smaller.structure == report.structure
    load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense-smaller"))
    logits(plain)
    assert float((logits(plain) - expected).norm() / expected.norm()) < 0.1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`dense` with {report.structure['achieved']:.1%} of its blocks' weights removed" in card
    saved = json.loads((tmp_path / "out" / "llmcompress.json").read_text())
    assert saved["structure"] == report.structure and saved["pattern"] == "dense"


def test_a_structured_step_comes_first() -> None:
    prune = {"prune": {"method": "llm_pruner", "sparsity": 0.2}}
    for stages in ([{"smooth": {}}, prune], [prune, prune]):
        with pytest.raises(UserError, match="comes first, and once"):
            Recipe.from_tree({"stages": stages}, "wrong")


def test_a_plan_foretells_the_size(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense")
    planned = api.plan(source, recipe(), tmp_path / "out", options(recover_steps=2))
    assert not (tmp_path / "out").exists()
    report = compress(source, recipe(), tmp_path / "out", options())
    assert planned.size_bytes["after"] == pytest.approx(report.size_bytes["after"], rel=0.1)
    assert any("removed first" in note for note in planned.notes)


# --- all or nothing, and the same again ---


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("kind", ["", "full", "lora"])
def test_same_seed_same_bytes(kind: str, tmp_path: Path) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    given: dict[str, Any] = {"recover_steps": 3, "recover": kind} if kind else {}
    source = tiny_folder(tmp_path / "dense")
    for name in ("one", "two"):
        compress(source, recipe(), tmp_path / name, options(**given))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "one", "two"]


@pytest.mark.parametrize("broken", ["copy_blocks", "recover", "removal_error", "compare"])
def test_a_failure_leaves_no_folder_that_looks_finished(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("broken")

    where = "restructure" if broken == "removal_error" else "run"
    monkeypatch.setattr(f"llmcompress.{where}.{broken}", fail)
    source = tiny_folder(tmp_path / "dense")
    with pytest.raises(RuntimeError, match="broken"):
        compress(source, recipe(), tmp_path / "made" / "out", options(recover_steps=2, evaluate=True))
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["out.partial"]
    assert not list((tmp_path / "made" / "out.partial").glob("*.safetensors.index.json"))


def test_what_is_not_zeroing_is_refused_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.restructure.removal_error", lambda *given: 0.3)
    source = tiny_folder(tmp_path / "dense")
    with pytest.raises(UserError, match="not the same as zeroing"):
        compress(source, recipe(), tmp_path / "out", options())
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


# --- recovery ---


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_recovery_lowers_the_loss_and_changes_the_blocks_alone(kind: str, model_type: str, tmp_path: Path) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    source = tiny_folder(tmp_path / "dense", model_type)
    report = compress(source, recipe(), tmp_path / "out", options(recover_steps=30, recover=kind))
    loss = report.recovery["loss"]
    assert len(loss) == 30 and sum(loss[-5:]) < 0.95 * sum(loss[:5])
    compress(source, recipe(), tmp_path / "plain", options())
    after, before = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("out", "plain"))
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    blocks = "model.layers." if model_type == "llama" else "transformer.h."
    assert changed and all(name.startswith(blocks) for name in changed)
    if kind == "lora":
        assert all(after[name].dim() == 2 for name in changed)


def test_recovery_without_a_structured_step_is_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense")
    for call in (compress, api.plan):
        with pytest.raises(UserError, match="nothing to recover"):
            call(source, "wanda-2of4", tmp_path / "out", options(recover_steps=3))
    for wrong in ({"recover_steps": -1}, {"recover": "half"}):
        with pytest.raises(UserError):
            options(**wrong)


def test_without_peft_the_fix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    source = tiny_folder(tmp_path / "dense")
    with pytest.raises(UserError, match="peft is not installed"):
        compress(source, recipe(), tmp_path / "out", options(recover_steps=3, recover="lora"))
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
