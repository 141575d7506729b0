"""Tiny random models of many architectures, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
_NO_KV = {k: v for k, v in _LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")}

#: model type → configuration
CONFIGS: dict[str, dict[str, object]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**_LLAMA_LIKE, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi3": {**_LLAMA_LIKE, "num_key_value_heads": 2},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "bos_token_id": 1,
    },
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "gpt_neox": _NO_KV,
    "gpt2": _GPT_LIKE,
    "cohere": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
    "gptj": {**_GPT_LIKE, "rotary_dim": 4},
    "nemotron": _LLAMA_LIKE,
}  # fmt: skip


def tiny_model(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model whose norms have weights (and biases) far from one (and zero)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            else:
                parameter.mul_(4)  # initial weights are so small that blocks hardly change their input
    return model


def tiny_folder(
    path: Path, model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """The same model saved as a checkpoint."""
    tiny_model(model_type, seed, **changes).to(dtype).save_pretrained(path)
    return path
