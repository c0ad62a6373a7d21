"""Rotary embeddings in config.json, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) write them."""

from __future__ import annotations

import math
from typing import Any

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.mcore.model.config import ModelConfig, YarnConfig

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


def partial_of(raw: Raw) -> Any:
    """Return the share of a head's channels that turn; None where config.json does not say."""
    return rope_of(raw)[1].get("partial_rotary_factor", raw.get("partial_rotary_factor"))


def rope_problems(raw: Raw, *, partial: bool = False) -> list[str]:
    """Say what of the rotary embedding cannot be computed.

    Args:
        raw: config.json.
        partial: whether transformers' class of the family follows partial_rotary_factor.
    """
    base, scaling = rope_of(raw)
    if any(isinstance(value, dict) for value in scaling.values()):
        return ["rope_parameters: different ones for different layers"]
    problems = []
    if not isinstance(base, int | float) or isinstance(base, bool) or not 1 < base <= 1 << 62:
        problems.append(f"rope_theta: {base} (a number above 1 is supported)")
    problems += scaling_problems(scaling)
    share = partial_of(raw)
    if not partial and share not in (None, 1, 1.0):
        problems.append(
            f"partial_rotary_factor: {share} (transformers' class of this family turns all channels)"
        )
    if partial and share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
        problems.append(f"partial_rotary_factor: {share} (a number above 0, and 1 at most)")
    return problems


def scaling_problems(scaling: dict[str, Any]) -> list[str]:
    """Say what of a scaling cannot be computed."""
    kind = kind_of(scaling)
    if kind == "llama3":
        wrong = [f"{k} {scaling.get(k)}" for k, v in _LLAMA3.items() if scaling.get(k) != v]
        problems = []
        if wrong:
            expected = ", ".join(f"{key} {value}" for key, value in _LLAMA3.items())
            problems.append(f"llama3 rope scaling with {', '.join(wrong)} (supported: {expected})")
        if not isinstance(scaling.get("factor"), int | float):
            problems.append(f"llama3 rope scaling with factor {scaling.get('factor')}")
        return problems
    if kind == "yarn":
        return [
            f"yarn rope scaling with {key} {scaling.get(key)} (a number above 0 is expected)"
            for key in ("factor", "original_max_position_embeddings")
            if not isinstance(scaling.get(key), int | float) or scaling[key] <= 0
        ]
    if kind == "linear":
        factor = scaling.get("factor")
        usable = isinstance(factor, int | float) and factor > 0
        return [] if usable else [f"linear rope scaling with factor {factor}"]
    if kind == "default":
        return []
    return [f"{kind} rope scaling (supported: none, linear, llama3, yarn)"]


def rope_section(raw: Raw) -> dict[str, Any]:
    """Return the keys of the section model."""
    base, scaling = rope_of(raw)
    kind = kind_of(scaling)
    return {
        "rotary_base": base,
        "rope_scaling_factor": scaling["factor"] if kind == "llama3" else None,
        "rope_linear_factor": scaling["factor"] if kind == "linear" else None,
        "yarn": yarn_section(scaling) if kind == "yarn" else None,
    }


def yarn_section(scaling: dict[str, Any]) -> YarnConfig:
    """Return YaRN's section; the factor on queries and keys is computed as transformers does."""
    attention = scaling.get("attention_factor")
    scales = [scale for scale in map(scaling.get, ("mscale", "mscale_all_dim")) if scale]
    if attention is None and len(scales) == 2:
        # transformers: get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim).
        one, other = (
            1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1.0
            for scale in scales
        )
        attention = one / other
    return YarnConfig(
        factor=scaling["factor"],
        original_positions=scaling["original_max_position_embeddings"],
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        attention_factor=attention,
        truncate=scaling.get("truncate", True),
    )


def scaling_config(model: ModelConfig) -> dict[str, Any] | None:
    """Return a scaling as config.json has it, without the base; None where there is none."""
    if model.rope_scaling_factor is not None:
        return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
    if model.rope_linear_factor is not None:
        return {"rope_type": "linear", "factor": model.rope_linear_factor}
    if model.yarn is None:
        return None
    yarn = model.yarn
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if yarn.attention_factor is not None:
        found["attention_factor"] = yarn.attention_factor
    return found if yarn.truncate else {**found, "truncate": False}


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json: those of transformers 4, which 5 reads too."""
    return {"rope_theta": float(model.rotary_base), "rope_scaling": scaling_config(model)}
