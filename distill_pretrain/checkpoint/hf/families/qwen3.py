"""Qwen3: norms of every head's query and key."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
    window_from_layer,
)
from distill_pretrain.mcore.model.config import ModelConfig


def _keys(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.attention_output_bias, "use_sliding_window": False}


FAMILIES = (
    llama_like(
        model_type="qwen3",
        title="Qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        keys=_keys,
        always=frozenset({"qk_norm"}),
        options=ATTENTION_BIASES,
        section=lambda raw: {"qk_norm": True, **attention_biases(raw)},
        problems=window_from_layer,
        cannot_write=half_of_the_biases,
    ),
)
