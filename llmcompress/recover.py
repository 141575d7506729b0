"""Training a pruned model for a few steps, so that what is left makes up for what was removed.

The divergence of its predictions from the dense model's on the calibration rows is minimised by AdamW, a few rows a
step in an order drawn from the seed, with a rate that rises for a twentieth of the steps and falls to zero along a
cosine. (LLM-Pruner trains on the next token of fifty thousand texts; the few rows that are at hand here would be
learnt by heart, and the held-out perplexity rise.) Either all weights of the blocks
are trained, or, as in LLM-Pruner (Ma et al., 2023, arXiv:2305.11627), low-rank additions to their matrices (Hu et al.,
2021, arXiv:2106.09685), which are merged into them at the end. Embeddings and head stay as they are.

Both models are whole in memory for this: the dense one in the dtype of the arithmetic, the pruned one in float32 with
gradients and the two moments of AdamW of whatever is trained: 16 bytes for a trained parameter, 4 for the others."""

from __future__ import annotations

import gc
import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.companions import COMPANIONS, REMOTE_CODE
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.matrix import is_matrix
from llmcompress.progress import Progress

#: what can be trained
KINDS = ("full", "lora")
#: tokens of one step
STEP_TOKENS = 2048
#: peak rate of AdamW
RATE = {"full": 2e-4, "lora": 1e-3}
RANK = 8
WARM_UP = 0.05


def recover(
    model: BlockwiseModel, dense: BlockwiseModel, tokens: Tensor, steps: int, kind: str, seed: int,
    writer: CheckpointWriter, progress: Progress,
) -> tuple[Checkpoint, dict[str, Any]]:  # fmt: skip
    """Trains the model and writes it under the same names and dtypes.

    Args:
        model: what was pruned; it is opened again, whole.
        dense: what it was pruned from; the same.
        tokens: (N, T) rows to train on.
        steps: of AdamW.
        kind: one of KINDS.
        seed: of the order of the rows and of the low-rank additions.
        writer: entered; it is sealed here and never published.
        progress: where to show it.

    Returns:
        The trained checkpoint, in a hidden folder that is gone when ``writer`` is left, and figures for the report.

    Raises:
        UserError: peft is not installed, or the loss is not finite.
    """
    peft = _peft() if kind == "lora" else None
    names = [f"{b.name}.{name}" for b in model.blocks for name, _ in b.module.named_parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher, network = _whole(dense, dense.dtype), _whole(model, torch.float32)
        trained: nn.Module = network
        if peft is None:
            for name in names:
                network.get_parameter(name).requires_grad_(True)
        else:
            trained = _with_additions(peft, network, model)
        with progress.phase("recovering", steps) as advance:
            losses = _train(trained, teacher, tokens, steps, RATE[kind], seed, advance)
        if peft is not None:
            network = trained.merge_and_unload()  # type: ignore[operator]
    _write(model, network, names, writer)
    del network, trained, teacher
    gc.collect()
    figures = {"kind": kind, "steps": steps, "rate": RATE[kind], "rows per step": _rows_per_step(tokens)}
    return Checkpoint(writer.partial), figures | {"loss": [round(loss, 6) for loss in losses]}


def recovery_bytes(model: BlockwiseModel, kind: str) -> int:
    """Predicted memory of weights, gradients and moments; what the steps hold in between comes on top."""
    every = sum(p.numel() for p in model.model.parameters())
    trained = sum(p.numel() for b in model.blocks for p in b.module.parameters()) if kind == "full" else 0
    return (4 + model.dtype.itemsize) * every + 12 * trained


def _whole(model: BlockwiseModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in memory, for evaluation: nothing is dropped at random, nothing trained."""
    network = AutoModelForCausalLM.from_pretrained(
        model.checkpoint.folder, dtype=dtype, trust_remote_code=model.trust_remote_code
    )
    return network.to(model.device).eval().requires_grad_(False)


def _train(
    network: nn.Module, teacher: nn.Module, tokens: Tensor, steps: int, rate: float, seed: int,
    advance: Callable[[int], None],
) -> list[float]:  # fmt: skip
    """KL(teacher ‖ network) per token, of every step before its update."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0)
    order = _order(len(tokens), steps * _rows_per_step(tokens), seed)
    device = wanted[0].device
    tokens = tokens.clone()  # samples of the model are inference tensors, which take no part in gradients
    losses = []
    for step, chosen in enumerate(order.view(steps, -1)):
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, steps)
        rows = tokens[chosen].to(device)
        with torch.no_grad():
            aim = _log_probabilities(teacher, rows)
        loss = F.kl_div(_log_probabilities(network, rows), aim, reduction="batchmean", log_target=True)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss of step {step} is not finite", "--recover-steps", "leave the recovery out")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        advance(1)
    return losses


def _log_probabilities(network: nn.Module, rows: Tensor) -> Tensor:
    """Of every next token, (rows · (T − 1), vocabulary)."""
    return network(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)


def _schedule(step: int, steps: int) -> float:
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _rows_per_step(tokens: Tensor) -> int:
    return max(1, min(len(tokens), STEP_TOKENS // tokens.shape[1]))


def _order(rows: int, needed: int, seed: int) -> Tensor:
    """(needed,) row numbers: one random order of all rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))]
    return torch.cat(rounds)[:needed]


def _with_additions(peft: Any, network: PreTrainedModel, model: BlockwiseModel) -> nn.Module:
    """The network with a low-rank addition, at first zero, to every matrix of the blocks."""
    matrices = [f"{b.name}.{name}" for b in model.blocks for name, m in b.module.named_modules() if is_matrix(m)]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, bias="none", target_modules=matrices)
    return peft.get_peft_model(network, config).eval()


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UserError("peft is not installed", "--recover lora",
                        "pip install 'llmcompress[recover]', or use --recover full") from None  # fmt: skip


def _write(model: BlockwiseModel, network: nn.Module, names: list[str], writer: CheckpointWriter) -> None:
    """The checkpoint with the blocks' parameters as they are now."""
    trained = dict(network.named_parameters())
    for index, block in enumerate(model.blocks):
        tensors = model.checkpoint.read(model.block_sources(index))
        for name in (n for n in names if n.startswith(block.name + ".")):
            stored = tensors[model.disk_name(name)]
            tensors[model.disk_name(name)] = trained[name].detach().cpu().to(stored.dtype)
        writer.add(tensors)
    for some in model.checkpoint.in_chunks(model.rest_sources()):
        writer.add(model.checkpoint.read(some))
    config = json.dumps(model.checkpoint.config, indent=2)
    writer.seal({"config.json": config}, model.checkpoint.folder, COMPANIONS + REMOTE_CODE)
