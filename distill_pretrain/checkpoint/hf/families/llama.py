"""Llama."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
    only_full_layers,
)
from distill_pretrain.mcore.model.config import ModelConfig


def _cannot_write(model: ModelConfig) -> str | None:
    # LlamaConfig refuses such a width, though the model would run; MistralConfig does not.
    if model.hidden_size % model.num_attention_heads:
        return "a width that the heads do not divide"
    return half_of_the_biases(model)


def _keys(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.attention_output_bias, "mlp_bias": model.mlp_bias}


FAMILIES = (
    llama_like(
        model_type="llama",
        title="Llama",
        architecture="LlamaForCausalLM",
        defaults={},
        keys=_keys,
        options=ATTENTION_BIASES | {"mlp_bias"},
        problems=only_full_layers,
        section=lambda raw: {**attention_biases(raw), "mlp_bias": bool(raw.get("mlp_bias"))},
        cannot_write=_cannot_write,
    ),
)
