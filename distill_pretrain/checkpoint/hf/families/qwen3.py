"""Qwen3: norms of every head's query and key."""

from __future__ import annotations

from distill_pretrain.checkpoint.hf.llama_like import llama_like, window_from_layer

FAMILIES = (
    llama_like(
        model_type="qwen3",
        title="Qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        keys={"attention_bias": False, "use_sliding_window": False},
        always=frozenset({"qk_norm"}),
        section=lambda raw: {"qk_norm": True},
        problems=window_from_layer,
    ),
)
