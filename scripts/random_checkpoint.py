"""Makes a Llama checkpoint of random weights, for measuring time and memory at sizes nobody has to download.

    python scripts/random_checkpoint.py OUT --preset tinyllama-block
    python scripts/random_checkpoint.py OUT --hidden 1024 --intermediate 2816 --blocks 4 --heads 16 --vocab 8000

One shard per block is written and forgotten before the next is drawn, so memory stays that of one block (or of the
embeddings, where they are larger). Weights are normal with variance 1 / inputs and those that write into the residual
stream smaller by √(2 · blocks): activations then have the size of one everywhere, at any depth. There is no tokenizer:
calibrate on the model's own samples or on stored token rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a Llama.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the MLP.
        blocks: how many.
        heads, kv_heads: query heads, and heads of keys and values.
        vocab: token ids.
        dtype: of the stored weights.
        positions: longest sequence.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    dtype: str = "bfloat16"
    positions: int = 2048


PRESETS = {
    "tinyllama-block": Shape(hidden=2048, intermediate=5632, blocks=2, heads=32, kv_heads=4),
    "llama-7b-block": Shape(hidden=4096, intermediate=11008, blocks=1, heads=32, kv_heads=32),
    "llama-7b": Shape(hidden=4096, intermediate=11008, blocks=32, heads=32, kv_heads=32),
}


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Writes ``folder``, which must not exist yet, and returns its bytes of weights."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    last = shape.blocks + 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(shape, draw), start=1):
        file = f"model-{number:05d}-of-{last:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1) + "\n")
    return total


def _shards(shape: Shape, draw: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Embeddings, final norm and head; then block after block."""
    dtype = DTYPES[shape.dtype]

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=draw).mul_(scale).to(dtype)

    hidden, inner = shape.hidden, shape.intermediate
    yield {
        "model.embed_tokens.weight": normal(shape.vocab, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": normal(shape.vocab, hidden, hidden**-0.5),
    }
    shared = hidden // shape.heads * shape.kv_heads
    into = (2 * shape.blocks) ** -0.5
    matrices = {
        "self_attn.q_proj": (hidden, hidden, 1.0),
        "self_attn.k_proj": (shared, hidden, 1.0),
        "self_attn.v_proj": (shared, hidden, 1.0),
        "self_attn.o_proj": (hidden, hidden, into),
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, into),
    }
    for block in range(shape.blocks):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{n}.weight": normal(out, in_, s * in_**-0.5) for n, (out, in_, s) in matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        yield tensors | {f"{prefix}{n}.weight": torch.ones(hidden, dtype=dtype) for n in norms}


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": shape.dtype,
    }


def main() -> None:
    """Parses the shape and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--preset", choices=PRESETS, help="where the numbers below start from")
    for name in ("hidden", "intermediate", "blocks", "heads", "kv-heads", "vocab", "positions"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    changes = {name: value for name in Shape.__annotations__ if (value := getattr(options, name)) is not None}
    if options.preset is None:
        missing = [name for name in ("hidden", "intermediate", "blocks", "heads") if name not in changes]
        if missing:
            parser.error(f"without --preset these are needed: {', '.join('--' + name for name in missing)}")
        shape = Shape(**{"kv_heads": changes["heads"], **changes})
    else:
        shape = replace(PRESETS[options.preset], **changes)
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or (shape.hidden // shape.heads) % 2:
        parser.error("--heads must divide --hidden into an even head size, and --kv-heads must divide --heads")
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    print(f"{options.out}: {write_checkpoint(options.out, shape, options.seed) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
