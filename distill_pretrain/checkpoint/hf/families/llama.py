"""Llama."""

from __future__ import annotations

from distill_pretrain.checkpoint.hf.llama_like import llama_like
from distill_pretrain.mcore.model.config import ModelConfig


def _cannot_write(model: ModelConfig) -> str | None:
    # LlamaConfig refuses such a width, though the model would run; MistralConfig does not.
    if model.hidden_size % model.num_attention_heads:
        return "a width that the heads do not divide"
    return None


FAMILIES = (
    llama_like(
        model_type="llama",
        title="Llama",
        architecture="LlamaForCausalLM",
        defaults={},
        keys={"attention_bias": False, "mlp_bias": False},
        cannot_write=_cannot_write,
    ),
)
