"""Olmo 2 and 3: norms after the branches and of all queries together; Olmo 3 with windows in three layers of four."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import REORDERED, WINDOW, Raw, shortest_pattern
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
    "input_layernorm.weight": ("post_attention_layernorm.weight", "post_attention_layernorm"),
    "pre_mlp_layernorm.weight": ("post_mlp_layernorm.weight", "post_feedforward_layernorm"),
}
"""Parameter of a Pre-LN layer -> the one that is there instead, and its tensor."""


class OlmoTensors(LlamaTensors):
    """Llama's, but for norms: those of branches follow them, those of queries and keys span all heads."""

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer."""
        here, hidden = f"model.layers.{number}.", self.model.hidden_size
        pieces = {}
        for name, found in super().in_layer(number).items():
            if name not in _NORMS:
                pieces[name] = found
                continue
            parameter, tensor = _NORMS[name]
            pieces[parameter] = whole(f"{here}{tensor}.weight", hidden)
        for kind, heads in (("q", self.heads), ("k", self.groups)):
            name = {"q": "query_norm", "k": "key_norm"}[kind]
            tensor = f"{here}self_attn.{kind}_norm.weight"
            pieces[f"self_attention.{name}.weight"] = [
                Piece(tensor=tensor, shape=(heads * self.head_dim,), split=0)
            ]
        return pieces


def _section(raw: Raw) -> dict[str, Any]:
    return {
        **attention_biases(raw),
        "qk_norm_whole": True,
        "norm_placement": "reordered",
    }


def _types(raw: Raw) -> list[Any]:
    """Kinds of the layers; those of the class where config.json does not say."""
    found: list[Any] | None = raw.get("layer_types")
    if found is not None:
        return found
    layers = range(raw["num_hidden_layers"])
    return ["full_attention" if n % 4 == 3 else "sliding_attention" for n in layers]


def _window_problems(raw: Raw) -> list[str]:
    layers, window = raw.get("num_hidden_layers"), raw.get("sliding_window")
    if not isinstance(layers, int):
        return []
    types = _types(raw)
    problems = [f"layer_types: {kind}" for kind in sorted({str(t) for t in types} - set(_KINDS))]
    if len(types) != layers:
        problems.append(f"layer_types: {len(types)} of them for {layers} layers")
    if "sliding_attention" in types and (not isinstance(window, int) or window < 1):
        problems.append(f"sliding_window: {window} (layers have one)")
    return problems


def _window_section(raw: Raw) -> dict[str, Any]:
    kinds = shortest_pattern([_KINDS[kind] for kind in _types(raw)])
    window = raw["sliding_window"] if "w" in kinds else None
    return {**_section(raw), "attention_layers": kinds, "sliding_window": window}


def _by_layer(raw: Raw) -> dict[str, dict[str, Any]] | None:
    """Rotary embeddings of the two kinds of layers, as transformers 5 writes them; None in the older form."""
    found = raw.get("rope_parameters") or {}
    return found if isinstance(found, dict) and "full_attention" in found else None


def _plain(raw: Raw) -> Raw:
    """The older form, in which scaling is that of full layers."""
    by_layer = _by_layer(raw)
    if by_layer is None:
        return raw
    return {**raw, "rope_parameters": by_layer["full_attention"]}


def _rotary_problems(raw: Raw) -> list[str]:
    problems = rope_problems(_plain(raw))
    base, scaling = rope_of(_plain(raw))
    if scaling.get("truncate") is False:
        problems.append("truncate: False (transformers' class of this family truncates)")
    other = (_by_layer(raw) or {}).get("sliding_attention")
    if other is not None and (kind_of(other) != "default" or other.get("rope_theta", base) != base):
        problems.append(
            f"rope_parameters: {other} in layers with a window (default, of the same base, is supported)"
        )
    kind = kind_of(scaling)
    return problems + ([f"{kind} rope scaling"] if kind in ("llama3", "linear") else [])


def _rotary_section(raw: Raw) -> dict[str, Any]:
    found = rope_section(_plain(raw))
    if found["yarn"] is not None:
        found["yarn"] = found["yarn"].model_copy(update={"full_layers_only": True})
    return found


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    """Write both forms: transformers 4 and 5 have the class."""
    base = float(model.rotary_base)
    scaling = scaling_config(model) or {"rope_type": "default"}
    return {
        **rope_config(model),
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
        },
    }


def _cannot_write_windows(model: ModelConfig) -> str | None:
    if model.yarn is not None and not (model.yarn.full_layers_only and model.yarn.truncate):
        return "yarn of olmo3 is for full layers only, and truncates"
    return half_of_the_biases(model)


def _window_keys(model: ModelConfig) -> dict[str, Any]:
    names = {letter: name for name, letter in _KINDS.items()}
    return {
        "attention_bias": model.attention_output_bias,
        "sliding_window": model.sliding_window,
        "layer_types": [names[model.attention_of(number)] for number in range(model.num_layers)],
    }


_ALWAYS = frozenset({"qk_norm_whole", REORDERED})

FAMILIES = (
    llama_like(
        model_type="olmo2",
        title="Olmo 2",
        architecture="Olmo2ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        keys=lambda model: {"attention_bias": model.attention_output_bias},
        always=_ALWAYS,
        options=ATTENTION_BIASES,
        section=_section,
        cannot_write=half_of_the_biases,
        tensors=OlmoTensors,
    ),
    llama_like(
        model_type="olmo3",
        title="Olmo 3",
        architecture="Olmo3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
        keys=_window_keys,
        always=_ALWAYS | {WINDOW},
        options=ATTENTION_BIASES,
        problems=_window_problems,
        section=_window_section,
        cannot_write=_cannot_write_windows,
        tensors=OlmoTensors,
        scalings=frozenset({"yarn"}),
        rotary=(_rotary_problems, _rotary_section, _rotary_config),
    ),
)
