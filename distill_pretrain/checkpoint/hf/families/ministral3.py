"""Ministral 3: Mistral with YaRN and queries that grow with the position."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import Raw
from distill_pretrain.checkpoint.hf.llama_like import llama_like, used_window
from distill_pretrain.checkpoint.hf.rope import (
    kind_of,
    rope_config,
    rope_of,
    rope_problems,
    rope_section,
)
from distill_pretrain.mcore.model.config import ModelConfig

_BETA = "llama_4_scaling_beta"


def _problems(raw: Raw) -> list[str]:
    problems = rope_problems(raw)
    scaling = rope_of(raw)[1]
    if kind_of(scaling) != "yarn":
        problems.append(f"{kind_of(scaling)} rope scaling (yarn is what ministral3 has)")
    beta = scaling.get(_BETA)
    if not isinstance(beta, int | float) or beta <= 0:
        problems.append(f"{_BETA}: {beta} (a number above 0 is expected in rope_parameters)")
    return problems


def _rotary_section(raw: Raw) -> dict[str, Any]:
    scaling = rope_of(raw)[1]
    return {
        **rope_section(raw),
        "attention_temperature": scaling[_BETA],
        "attention_temperature_positions": scaling["original_max_position_embeddings"],
    }


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    found = rope_config(model)
    scaling = {**found["rope_scaling"], _BETA: model.attention_temperature}
    # Only transformers 5 has the class.
    return {"rope_parameters": {**scaling, "rope_theta": found["rope_theta"]}}


def _cannot_write(model: ModelConfig) -> str | None:
    if model.yarn and model.yarn.original_positions == model.attention_temperature_positions:
        return None
    return (
        f"attention_temperature_positions: {model.attention_temperature_positions}; ministral3 has those of "
        "yarn.original_positions"
    )


def _window_problems(raw: Raw) -> list[str]:
    window = used_window(raw)
    return [f"sliding_window: {window} is in use"] if window else []


FAMILIES = (
    llama_like(
        model_type="ministral3",
        title="Ministral 3",
        architecture="Ministral3ForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                _BETA: 0.1,
            },
        },
        keys={"sliding_window": None},
        always=frozenset({"attention_temperature", "yarn"}),
        scalings=frozenset(),
        problems=_window_problems,
        cannot_write=_cannot_write,
        rotary=(_problems, _rotary_section, _rotary_config),
    ),
)
