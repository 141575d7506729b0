"""Text that a model writes itself, to calibrate on where no data is at hand: ancestral sampling at temperature 1.

Every sequence has a random stream of its own, keyed by (seed, its number), and its next token is where that stream's
uniform number falls in the cumulative distribution. So a sequence does not depend on which others share its batch,
up to the rounding of the arithmetic. End of sequence is never drawn: a model was not trained on what follows it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from llmcompress.arithmetic import choose_dtype
from llmcompress.errors import UserError
from llmcompress.model.checkpoint import Checkpoint

#: keys and values of one batch may fill this many bytes; a constant, so that batches are the same on every machine
CACHE_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}
MAX_BATCH = 128
#: share of the available memory that sampling may take
COMFORTABLE = 0.8


@torch.inference_mode()
def self_samples(
    folder: str | Path,
    requests: list[tuple[int, int, int]],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Tensor]:
    """Lets a model write token sequences. It is loaded whole for this and released again.

    Args:
        folder: of the dense checkpoint.
        requests: (count, length, seed) each; all are drawn together, which costs little more than one of them.
        device: where to compute.
        dtype: of the arithmetic; None for what `choose_dtype` makes of ``auto``.
        trust_remote_code: run code that came with the checkpoint.
        advance: called with the number of tokens written since its last call; they add up to Σ count · length.

    Returns:
        One (count, length) int64 tensor on the CPU per request. The first token is BOS, or drawn uniformly from the
        vocabulary where the model has none.

    Raises:
        UserError: a length beyond the model's positions, too little memory, or weights that are not finite.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for _, length, _ in requests:
        check_length(config, length)
    wanted = [(seed, number, length) for count, length, seed in requests for number in range(count)]
    longest = max(length for *_, length in wanted)
    batch = _batch_size(config, longest, torch.device(device).type)
    dtype = dtype or choose_dtype("auto", checkpoint, device)
    _require_memory(checkpoint, config, dtype, min(batch, len(wanted)), longest, device)
    with torch.random.fork_rng(devices=[]):
        model = _loaded(folder, dtype, trust_remote_code)
    model = model.to(device).eval()
    rows: list[Tensor] = []
    for start in range(0, len(wanted), batch):
        rows += _write(model, wanted[start : start + batch], advance, folder)
    del model
    gc.collect()
    drawn = iter(rows)
    return [torch.stack([next(drawn) for _ in range(count)]) for count, _, _ in requests]


def _loaded(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except Exception as error:  # transformers checks little: what does not fit raises whatever it runs into
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"transformers cannot load this model: {said}", str(folder), "check its files") from error


def check_length(config: Any, length: int, where: str = "--length") -> None:
    """Refuses rows that are longer than the model has positions.

    Args:
        config: of the model.
        length: tokens per row.
        where: they were asked for.

    Raises:
        UserError: see above.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(
            f"{length} tokens are more than the model's {positions} positions", where, f"use at most {positions}"
        )


def _write(
    model: Any, wanted: list[tuple[int, int, int]], advance: Callable[[int], None], folder: Path
) -> Iterator[Tensor]:
    """The sequences (seed, number, length) of one batch."""
    config = model.config.get_text_config()
    lengths = [length for *_, length in wanted]
    longest = max(lengths)
    uniform = torch.stack([_stream(seed, number, longest) for seed, number, _ in wanted]).to(model.device)
    tokens = torch.empty(len(wanted), longest, dtype=torch.long, device=model.device)
    bos = config.bos_token_id if config.bos_token_id in range(config.vocab_size) else None
    tokens[:, 0] = (uniform[:, 0] * config.vocab_size).long() if bos is None else bos
    forbidden = [token for token in _end_tokens(model) if token < config.vocab_size]
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    advance(len(wanted))
    for position in range(1, longest):
        step = model(input_ids=tokens[:, position - 1 : position], past_key_values=cache, use_cache=True)
        logits = step.logits[:, -1].float()
        logits[:, forbidden] = -torch.inf
        cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)
        finite &= cumulative[:, -1].isfinite().all()
        goal = uniform[:, position, None].float() * cumulative[:, -1:]
        # right: the first token whose cumulative weight exceeds the goal, never one of weight zero
        drawn = torch.searchsorted(cumulative, goal, right=True).clamp_(max=logits.shape[1] - 1)
        tokens[:, position] = drawn[:, 0]
        advance(sum(length > position for length in lengths))
    if not finite:
        raise _not_finite(model, tokens, folder)
    rows = tokens.cpu()
    return (row[:length] for row, length in zip(rows, lengths, strict=True))


class _GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory reserved once. Appending by concatenation copies all of them every step."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._used = length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (batch, heads, new, width) each and returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserved = [x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key_states, value_states)]
        end = self._used + key_states.shape[2]
        for reserved, new in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, self._used : end] = new
        self._used = end
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)
        return self.keys, self.values


def _stream(seed: int, number: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1) of one sequence, (length,) float64."""
    return torch.from_numpy(np.random.default_rng([seed, number]).random(length))


def _end_tokens(model: Any) -> list[int]:
    found: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return sorted(found)


def _not_finite(model: Any, tokens: Tensor, folder: Path) -> UserError:
    """Names the first weight, or else the first layer whose output, is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return UserError("NaN or infinite weights", f"{folder}: {name}", "give a sound checkpoint")
    broken: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(name)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(look(name))
    model(input_ids=tokens, use_cache=False)
    return UserError(
        "NaN or infinite activations leave it",
        broken[0] if broken else str(folder),
        "try --dtype float32, or check the weights",
    )


def _cache_bytes(config: Any, length: int, itemsize: int) -> int:
    """Keys and values of one sequence."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * length * itemsize


def _batch_size(config: Any, length: int, device_type: str) -> int:
    return max(1, min(MAX_BATCH, CACHE_BYTES[device_type] // _cache_bytes(config, length, 4)))


def _require_memory(
    checkpoint: Checkpoint, config: Any, dtype: torch.dtype, rows: int, length: int, device: str
) -> None:  # fmt: skip
    needed = checkpoint.parameters * dtype.itemsize
    needed += rows * (_cache_bytes(config, length, dtype.itemsize) + 16 * config.get_text_config().vocab_size)
    available = available_memory(device)
    if available is not None and needed > COMFORTABLE * available:
        raise UserError(
            f"sampling from the model needs {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are available",
            str(checkpoint.folder), "give a text file: --calibration FILE.txt and --eval-text FILE.txt",
        )  # fmt: skip


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that can still be allocated; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
