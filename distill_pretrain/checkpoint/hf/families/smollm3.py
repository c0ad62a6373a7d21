"""SmolLM3: Llama without rotary embedding in every fourth layer."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import NO_ROPE, Raw, shortest_pattern
from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
    only_full_layers,
)
from distill_pretrain.mcore.model.config import ModelConfig


def _problems(raw: Raw) -> list[str]:
    turned, layers = raw.get("no_rope_layers"), raw.get("num_hidden_layers")
    problems = only_full_layers(raw)
    if raw.get("use_sliding_window") and raw.get("sliding_window"):
        problems.append(f"use_sliding_window: sliding_window: {raw['sliding_window']} is in use")
    if turned is not None and (
        not isinstance(turned, list) or len(turned) != layers or not set(turned) <= {0, 1}
    ):
        problems.append(f"no_rope_layers: {turned} (0 or 1 for each of {layers} layers)")
    interval = raw.get("no_rope_layer_interval")
    if turned is None and (not isinstance(interval, int) or interval < 1):
        problems.append(f"no_rope_layer_interval: {interval}")
    return problems


def _section(raw: Raw) -> dict[str, Any]:
    turned = raw.get("no_rope_layers")
    if turned is None:
        interval, layers = raw["no_rope_layer_interval"], raw["num_hidden_layers"]
        turned = [int((number + 1) % interval != 0) for number in range(layers)]
    kinds = ["f" if turns else "n" for turns in turned]
    return {
        **attention_biases(raw),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "attention_layers": shortest_pattern(kinds),
    }


def _keys(model: ModelConfig) -> dict[str, Any]:
    layers = range(model.num_layers)
    return {
        "attention_bias": model.attention_output_bias,
        "mlp_bias": model.mlp_bias,
        "no_rope_layers": [int(model.attention_of(number) != "n") for number in layers],
        "layer_types": ["full_attention" for _ in layers],
        "use_sliding_window": False,
        "sliding_window": None,
    }


FAMILIES = (
    llama_like(
        model_type="smollm3",
        title="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        keys=_keys,
        always=frozenset({NO_ROPE}),
        options=ATTENTION_BIASES | {"mlp_bias"},
        problems=_problems,
        section=_section,
        cannot_write=half_of_the_biases,
    ),
)
