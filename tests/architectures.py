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


_MOE = {**_LLAMA_LIKE, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    **_NO_KV, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_SSM = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

#: model type → configuration; their folds are verified, but not written down in a test
MORE: dict[str, dict[str, object]] = {
    # dense decoders
    "qwen3_5_text": {
        **_LLAMA_LIKE,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "gemma3n_text": {
        **_LLAMA_LIKE,
        "intermediate_size": [64, 64],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 96,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        **_LLAMA_LIKE,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0,
    },
    "vaultgemma": {**_LLAMA_LIKE, "query_pre_attn_scalar": 8},
    "phi": _NO_KV,
    "cohere2": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo3": {**_LLAMA_LIKE, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo_hybrid": {
        **_LLAMA_LIKE,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "granite": _LLAMA_LIKE,
    "glm": _LLAMA_LIKE,
    "glm4": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "exaone4": _LLAMA_LIKE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96},
    "codegen": {**_GPT_LIKE, "rotary_dim": 4, "n_ctx": 64},
    "biogpt": _NO_KV,
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    },
    "gpt_bigcode": _GPT_LIKE,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 64,
    },
    "gpt_neox_japanese": {**_NO_KV, "intermediate_multiple_size": 2},
    "ministral": _LLAMA_LIKE,
    "ministral3": _LLAMA_LIKE,
    "seed_oss": _LLAMA_LIKE,
    "arcee": _LLAMA_LIKE,
    "helium": _LLAMA_LIKE,
    "ernie4_5": _LLAMA_LIKE,
    "hunyuan_v1_dense": _LLAMA_LIKE,
    "persimmon": _NO_KV,
    "apertus": _LLAMA_LIKE,
    "bitnet": _LLAMA_LIKE,
    "cwm": _LLAMA_LIKE,
    "diffllama": _LLAMA_LIKE,
    "nanochat": _LLAMA_LIKE,
    "jais2": _LLAMA_LIKE,
    "doge": {**_LLAMA_LIKE, "num_experts": 4},
    "modernbert-decoder": {**_NO_KV, "pad_token_id": 0, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt-sw3": _GPT_LIKE,
    "openai-gpt": _GPT_LIKE,
    "ctrl": {**_GPT_LIKE, "dff": 64},
    "lfm2": {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "minicpm3": {**_MLA},
    "internlm3": _LLAMA_LIKE,
    # recurrences
    "mamba": {**_SSM, "state_size": 8, "time_step_rank": 8},
    "mamba2": {**_SSM, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {**_SSM, "state_size": 8, "time_step_rank": 8},
    "rwkv": {**_SSM, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    "bamba": {
        **_LLAMA_LIKE,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "falcon_h1": {
        **_LLAMA_LIKE,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "recurrent_gemma": {
        **_LLAMA_LIKE,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "jamba": {
        **_MOE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "nemotron_h": {
        **_MOE,
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 32,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    # mixtures of experts
    "mixtral": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _MOE,
    "qwen3_next": {
        **_MOE,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "olmoe": _MOE,
    "flex_olmo": _MOE,
    "granitemoe": _MOE,
    "granitemoeshared": {**_MOE, "shared_intermediate_size": 64},
    "granitemoehybrid": {
        **_MOE,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _MLA,
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {**_MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "hunyuan_v1_moe": {**_MOE, "moe_topk": 2},
    "phimoe": _MOE,
    "gpt_oss": {**_MOE, "sliding_window": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "jetmoe": {
        **_SSM,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    },
    "llama4_text": {
        **_MOE,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 0],
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
    },
    "dots1": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "minimax": {**_MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": _MOE,
    "lfm2_moe": {**_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "afmoe": {**_MOE, "num_dense_layers": 1, "num_shared_experts": 1},
    "cohere2_moe": _MOE,
    "exaone_moe": {
        **_MOE,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "solar_open": {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "mimo_v2_flash": _MOE,
}

#: all of them
ALL = {**CONFIGS, **MORE}


def tiny_model(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model whose norms have weights (and biases) far from one (and zero)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**ALL[model_type], **changes})
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
