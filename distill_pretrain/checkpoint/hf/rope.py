"""Rotary embeddings in config.json, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) write them."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.mcore.model.config import ModelConfig

_LLAMA3 = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def rope_of(raw: Raw) -> tuple[Any, dict[str, Any]]:
    """Return the base and the scaling."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        return None, {"rope_type": f"{scaling}"}
    return scaling.get("rope_theta", raw.get("rope_theta", 10000)), scaling


def kind_of(scaling: dict[str, Any]) -> str:
    """Return the kind of scaling; "default" is none."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def rope_problems(raw: Raw) -> list[str]:
    """Say what of the rotary embedding cannot be computed."""
    base, scaling = rope_of(raw)
    if any(isinstance(value, dict) for value in scaling.values()):
        return ["rope_parameters: different ones for different layers"]
    problems = []
    if not isinstance(base, int | float) or base < 1 or int(base) != base:
        problems.append(f"rope_theta: {base} (a whole number is supported)")
    kind = kind_of(scaling)
    if kind == "llama3":
        wrong = [f"{k} {scaling.get(k)}" for k, v in _LLAMA3.items() if scaling.get(k) != v]
        if wrong:
            expected = ", ".join(f"{key} {value}" for key, value in _LLAMA3.items())
            problems.append(f"llama3 rope scaling with {', '.join(wrong)} (supported: {expected})")
        if not isinstance(scaling.get("factor"), int | float):
            problems.append(f"llama3 rope scaling with factor {scaling.get('factor')}")
    elif kind != "default":
        problems.append(f"{kind} rope scaling (supported: none, or llama3)")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor: {partial}")
    return problems


def rope_section(raw: Raw) -> dict[str, Any]:
    """Return the keys of the section model."""
    base, scaling = rope_of(raw)
    return {
        "rotary_base": int(base),
        "rope_scaling_factor": scaling["factor"] if kind_of(scaling) == "llama3" else None,
    }


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json: those of transformers 4, which 5 reads too."""
    scaling = None
    if model.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
    return {"rope_theta": float(model.rotary_base), "rope_scaling": scaling}
