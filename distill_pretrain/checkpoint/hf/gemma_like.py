"""What the families of Gemma share: sandwich norms, zero-centred scales, a scaled embedding, windows, GeGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_pretrain.checkpoint.hf.family import SANDWICH, WINDOW, Family, Raw, shortest_pattern
from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
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


class GemmaTensors(LlamaTensors):
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


_ALWAYS = frozenset(
    {"activation", "attention_scale_width", "embedding_scale", "zero_centred_norms", SANDWICH}
)


def gemma_like(
    *,
    model_type: str,
    title: str,
    architecture: str,
    defaults: dict[str, Any],
    always: frozenset[str] = frozenset(),
    options: frozenset[str] = frozenset(),
    problems: Callable[[Raw], list[str]],
    section: Callable[[Raw], dict[str, Any]],
    **more: Any,
) -> Family:
    """Make a family of Gemma's kind; arguments as of `llama_like`, beside what all of them have.

    `defaults` has a sliding_window_pattern: every so manyth layer is a full one where config.json does not say.
    """
    return llama_like(
        model_type=model_type,
        title=title,
        architecture=architecture,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            **defaults,
        },
        keys=_keys,
        always=_ALWAYS | always,
        options=ATTENTION_BIASES | {WINDOW} | options,
        problems=lambda raw: [*_problems(raw), *problems(raw)],
        section=lambda raw: {**_section(raw), **section(raw)},
        cannot_write=lambda model: _cannot_write(model, model_type),
        tensors=GemmaTensors,
        activations=("gelu_pytorch_tanh",),
        **more,
    )


def _problems(raw: Raw) -> list[str]:
    layers, window, wanted = raw.get("num_hidden_layers"), raw.get("sliding_window"), raw.get
    problems = []
    if wanted("hidden_activation") not in (None, "gelu_pytorch_tanh"):
        problems.append(f"hidden_activation: {raw['hidden_activation']} (gelu_pytorch_tanh)")
    if wanted("use_bidirectional_attention"):
        problems.append(f"use_bidirectional_attention: {raw['use_bidirectional_attention']}")
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
        "norm_placement": "sandwich",
        "zero_centred_norms": True,
        "embedding_scale": float(raw["hidden_size"]) ** 0.5,
        "attention_scale_width": raw["query_pre_attn_scalar"],
        "attention_layers": kinds,
        "sliding_window": raw["sliding_window"] if "w" in kinds else None,
    }


def _keys(model: ModelConfig) -> dict[str, Any]:
    names = {letter: name for name, letter in _KINDS.items()}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": model.attention_output_bias,
        "query_pre_attn_scalar": model.attention_scale_width,
        # Without such a layer any number will do, and the classes want one.
        "sliding_window": model.sliding_window or 4096,
        "layer_types": [names[model.attention_of(number)] for number in range(model.num_layers)],
        "final_logit_softcapping": model.logit_cap,
        "attn_logit_softcapping": model.attention_logit_cap,
    }


def _cannot_write(model: ModelConfig, model_type: str) -> str | None:
    if model.embedding_scale != float(model.hidden_size) ** 0.5:
        return f"embedding_scale: {model.embedding_scale}; {model_type} has the root of hidden_size"
    if model.activation != "gelu_tanh":
        return f"activation: {model.activation}; {model_type} has gelu_tanh"
    if model.hidden_size % model.num_attention_heads:
        return "a width that the heads do not divide"
    return half_of_the_biases(model)
