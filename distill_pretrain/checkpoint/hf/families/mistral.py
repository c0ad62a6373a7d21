"""Mistral: Llama, perhaps with a window in all layers."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import WINDOW, Raw
from distill_pretrain.checkpoint.hf.llama_like import llama_like, only_full_layers, used_window
from distill_pretrain.mcore.model.config import ModelConfig


def _section(raw: Raw) -> dict[str, Any]:
    window = used_window(raw)
    return {"sliding_window": window, "attention_layers": "w"} if window else {}


def _cannot_write(model: ModelConfig) -> str | None:
    mixed = len(model.attention_kinds) > 1
    return "layers of several kinds of attention" if mixed else None


FAMILIES = (
    llama_like(
        model_type="mistral",
        title="Mistral",
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        keys=lambda model: {"sliding_window": model.sliding_window},
        options=frozenset({WINDOW}),
        problems=only_full_layers,
        section=_section,
        cannot_write=_cannot_write,
    ),
)
