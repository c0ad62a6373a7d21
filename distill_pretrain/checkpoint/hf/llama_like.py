"""What the families share whose tensors and keys of config.json are named as Llama's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_pretrain.checkpoint.hf.family import Family, Raw, general_problems, nothing_more
from distill_pretrain.checkpoint.hf.rope import rope_config, rope_problems, rope_section
from distill_pretrain.checkpoint.hf.tensors import Correspondence, LlamaTensors
from distill_pretrain.mcore.model.config import ModelConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


SCALINGS = frozenset({"rope_linear_factor", "rope_scaling_factor", "yarn"})
"""Keys of the section model that scale rotary embeddings."""


def llama_like(
    *,
    model_type: str,
    title: str,
    architecture: str,
    defaults: dict[str, Any],
    keys: dict[str, Any] | Callable[[ModelConfig], dict[str, Any]],
    always: frozenset[str] = frozenset(),
    options: frozenset[str] = frozenset(),
    problems: Callable[[Raw], list[str]] = nothing_more,
    section: Callable[[Raw], dict[str, Any]] = lambda raw: {},
    cannot_write: Callable[[ModelConfig], str | None] = lambda model: None,
    tensors: type[Correspondence] = LlamaTensors,
    unpruned: str | None = None,
    scalings: frozenset[str] = SCALINGS,
    experts: bool = False,
    activations: tuple[str, ...] = ("silu", "swish"),
    rotary: tuple[
        Callable[[Raw], list[str]],
        Callable[[Raw], dict[str, Any]],
        Callable[[ModelConfig], dict[str, Any]],
    ] = (rope_problems, rope_section, rope_config),
) -> Family:
    """Make a family of RMSNorm, gated feed-forward blocks and rotary embeddings.

    Args:
        model_type: see `Family`.
        title: see `Family`.
        architecture: see `Family`.
        defaults: what transformers takes for keys that a config.json does not have.
        keys: of config.json, beside those that all of them have.
        always: see `Family`.
        options: see `Family`; `scalings` are options, too.
        problems: refusals beside those that all of them have; reads defaults too.
        section: keys of the section model beside those that all of them have.
        cannot_write: see `Family`.
        tensors: see `Family`.
        unpruned: see `Family`.
        scalings: of SCALINGS those that a model may have.
        experts: whether it has experts.
        activations: values of hidden_act that mean the family's activation.
        rotary: refusals, keys of the section model and keys of config.json for rotary embeddings.
    """

    def whole(raw: Raw) -> dict[str, Any]:
        return {**defaults, **raw}

    def all_problems(raw: Raw) -> list[str]:
        everything = whole(raw)
        general = general_problems(everything, experts=experts)
        return [
            *general,
            *_problems(everything, activations),
            *problems(everything),
            *rotary[0](everything),
        ]

    def model(raw: Raw) -> ModelConfig:
        everything = whole(raw)
        found = {**_section(everything), **rotary[1](everything), **section(everything)}
        return ModelConfig(**found)

    def config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
        return {
            "architectures": [architecture],
            "model_type": model_type,
            **_config(model, max_positions),
            "hidden_act": activations[0],
            **rotary[2](model),
            **(keys(model) if callable(keys) else keys),
        }

    return Family(
        model_type=model_type,
        title=title,
        architecture=architecture,
        arch="llama",
        tensors=tensors,
        section=model,
        config=config,
        problems=all_problems,
        always=always,
        options=options | scalings,
        cannot_write=cannot_write,
        unpruned=unpruned,
    )


def _problems(raw: Raw, activations: tuple[str, ...]) -> list[str]:
    problems = [f"{key} is missing" for key in _SIZES if raw.get(key) is None]
    if raw.get("hidden_act", activations[0]) not in activations:
        problems.append(f"hidden_act: {raw['hidden_act']} ({activations[0]} is supported)")
    return problems + _head_problems(raw)


def only_full_layers(raw: Raw) -> list[str]:
    """Refuse layers of other kinds than full attention."""
    other = sorted({str(kind) for kind in raw.get("layer_types") or []} - {"full_attention"})
    return [f"layer_types: {', '.join(other)}"] if other else []


ATTENTION_BIASES = frozenset({"qkv_bias", "attention_output_bias"})


def attention_biases(raw: Raw) -> dict[str, Any]:
    """Return the keys of the section model for attention_bias, on all four projections."""
    return dict.fromkeys(sorted(ATTENTION_BIASES), bool(raw.get("attention_bias")))


def half_of_the_biases(model: ModelConfig) -> str | None:
    """Say that biases of some projections alone cannot be written as attention_bias."""
    if model.qkv_bias == model.attention_output_bias:
        return None
    return (
        f"qkv_bias: {model.qkv_bias} and attention_output_bias: {model.attention_output_bias}; this family has both or "
        "none"
    )


def _head_problems(raw: Raw) -> list[str]:
    """Widths of heads that attention cannot be computed with."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return []
    width, groups = raw.get("head_dim"), raw.get("num_key_value_heads") or heads
    problems = []
    if width is None and hidden % heads:
        problems.append(f"hidden_size: {hidden} is no multiple of num_attention_heads: {heads}")
    elif isinstance(width or hidden, int) and (width or hidden // heads) % 2:
        problems.append(f"head_dim: {width or hidden // heads} is odd, and RoPE turns pairs")
    if isinstance(groups, int) and groups > 0 and heads % groups:
        problems.append(f"num_key_value_heads: {groups} does not divide {heads} attention heads")
    return problems


def used_window(raw: Raw) -> int | None:
    """Return sliding_window where some position would see less than all before it; layers are not looked at."""
    window, longest = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if raw.get("layer_types") or not isinstance(window, int):
        return None
    return None if isinstance(longest, int) and window >= longest else window


def window_from_layer(raw: Raw) -> list[str]:
    """Refuse Qwen's windows: use_sliding_window, from max_window_layers on, or layer by layer."""
    window, layers = used_window(raw), raw.get("num_hidden_layers")
    first = raw.get("max_window_layers")
    if (
        window
        and raw.get("use_sliding_window")
        and isinstance(layers, int)
        and (first or 0) < layers
    ):
        return [f"use_sliding_window: sliding_window: {window} is in use from layer {first} on"]
    return only_full_layers(raw)


def _section(raw: Raw) -> dict[str, Any]:
    heads = int(raw["num_attention_heads"])
    return {
        "arch": "llama",
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": raw["hidden_size"],
        "ffn_hidden_size": raw["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": raw.get("num_key_value_heads") or heads,
        "kv_channels": raw.get("head_dim") or int(raw["hidden_size"]) // heads,
        "norm_epsilon": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "init_std": raw.get("initializer_range") or 0.02,
    }


def _config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    heads = model.num_attention_heads
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": model.kv_channels or model.hidden_size // heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": 0.0,
    }
