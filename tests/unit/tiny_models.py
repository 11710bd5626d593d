"""Tiny causal language models of many types, with weights large enough that a leak shows."""

from __future__ import annotations

EVERY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
OF_TYPE = {
    "afmoe": {**MOE, "num_experts": 4, "head_dim": 16, "sliding_window": 8, "num_dense_layers": 1},
    "bloom": {"n_head": 4, "n_layer": 2},
    "deepseek_v3": {
        **MOE,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    # Its default, yarn, warns that so few positions do not match its factor.
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_text": {
        "head_dim": 16,
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3": {"head_dim": 16},
    "qwen3_next": {
        **MOE,
        **LINEAR,
        "head_dim": 16,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
    },
}


def tiny_model(model_type, implementation, **changes):
    """Build a model of a type, in training mode, float32, the same weights every time."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = {**EVERY, **OF_TYPE.get(model_type, {}), **changes}
    config = CONFIG_MAPPING[model_type](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float()
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        for weight in model.parameters():
            # At the usual 0.02 a layer hardly attends; and some models leave sinks or biases unset.
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=0.1)
            elif not torch.isfinite(weight).all():
                torch.nn.init.zeros_(weight)
    return model.train()
