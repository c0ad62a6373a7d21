"""Qwen2: biases on queries, keys and values."""

from __future__ import annotations

from distill_pretrain.checkpoint.hf.llama_like import llama_like, window_from_layer

FAMILIES = (
    llama_like(
        model_type="qwen2",
        title="Qwen2, Qwen2.5",
        architecture="Qwen2ForCausalLM",
        defaults={"num_key_value_heads": 32, "max_window_layers": 28},
        keys={"use_sliding_window": False},
        always=frozenset({"qkv_bias"}),
        section=lambda raw: {"qkv_bias": True},
        problems=window_from_layer,
    ),
)
