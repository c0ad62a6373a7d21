"""Gemma 3, its text model: Gemma's layers with windows in five of six, two rotary bases, norms of queries and keys."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.checkpoint.hf.gemma_like import gemma_like
from distill_pretrain.checkpoint.hf.rope import (
    kind_of,
    rope_config,
    rope_of,
    rope_problems,
    rope_section,
    scaling_config,
)
from distill_pretrain.mcore.model.config import ModelConfig


def _problems(raw: Raw) -> list[str]:
    caps = ("final_logit_softcapping", "attn_logit_softcapping")
    return [f"{key}: {raw[key]}" for key in caps if raw.get(key)]


def _by_layer(raw: Raw) -> tuple[Raw, dict[str, Any]]:
    """Rotary embeddings of full layers, in the older form, and of those with a window."""
    found = raw.get("rope_parameters") or {}
    local = {"rope_theta": raw["rope_local_base_freq"]}
    if isinstance(found, dict) and "full_attention" in found:
        return {**raw, "rope_parameters": found["full_attention"]}, {
            **local,
            **(found.get("sliding_attention") or {}),
        }
    return raw, local


def _rotary_problems(raw: Raw) -> list[str]:
    full, windowed = _by_layer(raw)
    problems = rope_problems(full)
    kind, base = kind_of(rope_of(full)[1]), windowed["rope_theta"]
    if kind not in ("default", "linear"):
        problems.append(f"{kind} rope scaling (gemma3 has none or linear)")
    if kind_of(windowed) != "default" or not isinstance(base, int | float) or base <= 1:
        problems.append(f"rope_parameters: {windowed} in layers with a window")
    return problems


def _rotary_section(raw: Raw) -> dict[str, Any]:
    full, windowed = _by_layer(raw)
    return {**rope_section(full), "windowed_rotary_base": windowed["rope_theta"]}


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    """Write both forms: transformers 4 and 5 have the class."""
    assert model.windowed_rotary_base is not None
    base, local = float(model.rotary_base), float(model.windowed_rotary_base)
    scaling = scaling_config(model) or {"rope_type": "default"}
    return {
        **rope_config(model),
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


FAMILIES = (
    gemma_like(
        model_type="gemma3_text",
        title="Gemma 3 (text)",
        architecture="Gemma3ForCausalLM",
        defaults={
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        always=frozenset({"qk_norm", "windowed_rotary_base"}),
        problems=_problems,
        section=lambda raw: {"qk_norm": True},
        scalings=frozenset({"rope_linear_factor"}),
        rotary=(_rotary_problems, _rotary_section, _rotary_config),
    ),
)
