"""Mistral."""

from __future__ import annotations

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.checkpoint.hf.llama_like import llama_like, used_window


def _problems(raw: Raw) -> list[str]:
    window = used_window(raw)
    return [f"sliding_window: {window} is in use"] if window else []


FAMILIES = (
    llama_like(
        model_type="mistral",
        title="Mistral",
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        keys={"sliding_window": None},
        problems=_problems,
    ),
)
