"""Gemma 3, its text model: sandwich norms, windows in five layers of six, two rotary bases, GeGLU."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import SANDWICH, WINDOW, Raw, shortest_pattern
from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
)
from distill_pretrain.checkpoint.hf.rope import (
    kind_of,
    rope_config,
    rope_of,
    rope_problems,
    rope_section,
    scaling_config,
)
from distill_pretrain.checkpoint.hf.tensors import LlamaTensors, Piece, whole
from distill_pretrain.mcore.model.config import ModelConfig

_KINDS = {"full_attention": "f", "sliding_attention": "w"}
_NORMS = {
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
"""Parameter -> tensor, of norms that Llama has not, or under another name."""


class Gemma3Tensors(LlamaTensors):
    """Llama's, with four norms in a layer."""

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer."""
        here = f"model.layers.{number}."
        norms = {
            f"{parameter}.weight": whole(f"{here}{tensor}.weight", self.model.hidden_size)
            for parameter, tensor in _NORMS.items()
        }
        return {**super().in_layer(number), **norms}


def _types(raw: Raw) -> list[Any]:
    """Kinds of the layers; those of the class where config.json does not say."""
    found: list[Any] | None = raw.get("layer_types")
    if found is not None:
        return found
    period = raw["sliding_window_pattern"]
    layers = range(1, raw["num_hidden_layers"] + 1)
    return ["sliding_attention" if number % period else "full_attention" for number in layers]


def _problems(raw: Raw) -> list[str]:
    layers, window, wanted = raw.get("num_hidden_layers"), raw.get("sliding_window"), raw.get
    problems = []
    if wanted("hidden_activation") not in (None, "gelu_pytorch_tanh"):
        problems.append(f"hidden_activation: {raw['hidden_activation']} (gelu_pytorch_tanh)")
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if wanted(key):
            problems.append(f"{key}: {raw[key]}")
    scalar = wanted("query_pre_attn_scalar")
    if not isinstance(scalar, int) or scalar < 1:
        problems.append(f"query_pre_attn_scalar: {scalar} (a whole number is supported)")
    if not isinstance(layers, int):
        return problems
    types = _types(raw)
    problems += [f"layer_types: {kind}" for kind in sorted({str(t) for t in types} - set(_KINDS))]
    if len(types) != layers:
        problems.append(f"layer_types: {len(types)} of them for {layers} layers")
    if not isinstance(window, int) or window < 1:
        problems.append(f"sliding_window: {window} (layers have one)")
    return problems


def _section(raw: Raw) -> dict[str, Any]:
    kinds = shortest_pattern([_KINDS[kind] for kind in _types(raw)])
    return {
        **attention_biases(raw),
        "activation": "gelu_tanh",
        "qk_norm": True,
        "norm_placement": "sandwich",
        "zero_centred_norms": True,
        "embedding_scale": float(raw["hidden_size"]) ** 0.5,
        "attention_scale_width": raw["query_pre_attn_scalar"],
        "attention_layers": kinds,
        "sliding_window": raw["sliding_window"] if "w" in kinds else None,
    }


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


def _keys(model: ModelConfig) -> dict[str, Any]:
    names = {letter: name for name, letter in _KINDS.items()}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": model.attention_output_bias,
        "query_pre_attn_scalar": model.attention_scale_width,
        "sliding_window": model.sliding_window,
        "layer_types": [names[model.attention_of(number)] for number in range(model.num_layers)],
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }


def _cannot_write(model: ModelConfig) -> str | None:
    if model.embedding_scale != float(model.hidden_size) ** 0.5:
        return f"embedding_scale: {model.embedding_scale}; gemma3 has the root of hidden_size"
    if model.activation != "gelu_tanh":
        return f"activation: {model.activation}; gemma3 has gelu_tanh"
    if model.hidden_size % model.num_attention_heads:
        return "a width that the heads do not divide"
    return half_of_the_biases(model)


FAMILIES = (
    llama_like(
        model_type="gemma3_text",
        title="Gemma 3 (text)",
        architecture="Gemma3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        keys=_keys,
        always=frozenset(
            {
                "activation",
                "attention_scale_width",
                "embedding_scale",
                "qk_norm",
                "windowed_rotary_base",
                "zero_centred_norms",
                SANDWICH,
            }
        ),
        options=ATTENTION_BIASES | {WINDOW},
        problems=_problems,
        section=_section,
        cannot_write=_cannot_write,
        tensors=Gemma3Tensors,
        activations=("gelu_pytorch_tanh",),
        scalings=frozenset({"rope_linear_factor"}),
        rotary=(_rotary_problems, _rotary_section, _rotary_config),
    ),
)
