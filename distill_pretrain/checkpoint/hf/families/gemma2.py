"""Gemma 2: Gemma's layers with windows in every other one, soft-capped scores of attention and soft-capped logits."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.checkpoint.hf.gemma_like import gemma_like

_CAPS = {"attn_logit_softcapping": "attention_logit_cap", "final_logit_softcapping": "logit_cap"}
"""Key of config.json -> key of the section model; null means none."""


def _problems(raw: Raw) -> list[str]:
    found = {key: raw[key] for key in _CAPS if raw[key] is not None}
    return [
        f"{key}: {cap} (a number above 0, or null, is expected)"
        for key, cap in found.items()
        if isinstance(cap, bool) or not isinstance(cap, int | float) or cap <= 0
    ]


def _section(raw: Raw) -> dict[str, Any]:
    return {name: raw[key] for key, name in _CAPS.items()}


FAMILIES = (
    gemma_like(
        model_type="gemma2",
        title="Gemma 2",
        architecture="Gemma2ForCausalLM",
        defaults={
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        options=frozenset(_CAPS.values()),
        problems=_problems,
        section=_section,
    ),
)
