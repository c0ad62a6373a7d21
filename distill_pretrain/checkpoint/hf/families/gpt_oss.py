"""gpt-oss: experts with biases and a clamped SwiGLU, learned sinks, windows in every other layer, YaRN, biases."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import (
    CLAMPED_SWIGLU,
    EXPERT_BIASES,
    UNPRUNED_EXPERTS,
    WINDOW,
    Raw,
    shortest_pattern,
)
from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
)
from distill_pretrain.checkpoint.hf.rope import rope_config, rope_problems, rope_section
from distill_pretrain.checkpoint.hf.tensors import ExpertTensors, Piece, Select, whole
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.parts import ExpertsConfig

_KINDS = {"full_attention": "f", "sliding_attention": "w"}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers takes where config.json says nothing."""


class GptOssTensors(ExpertTensors):
    """All experts of a layer in one tensor of each kind; gate and up take turns in the columns of the first."""

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer."""
        assert self.model.experts is not None
        hidden, experts = self.model.hidden_size, self.model.experts.number
        here = f"model.layers.{number}."
        return {
            **super().in_layer(number),
            "self_attention.core_attention.sinks.weight": [
                Piece(tensor=f"{here}self_attn.sinks", shape=(self.heads,), split=0)
            ],
            "mlp.router.weight": whole(f"{here}mlp.router.weight", experts, hidden),
            "mlp.router.bias": whole(f"{here}mlp.router.bias", experts),
        }

    def of_expert(self, here: str, expert: int) -> dict[str, list[Piece]]:
        """Return the pieces of an expert."""
        assert self.model.experts is not None
        hidden, width = self.model.hidden_size, self.model.ffn_hidden_size
        own, number = f"mlp.experts.local_experts.{expert}.", self.model.experts.number

        def piece(name: str, *shape: int, select: Select) -> list[Piece]:
            tensor = f"{here}experts.{name}"
            return [Piece(tensor=tensor, shape=(number, *shape), select=select, at=expert)]

        return {
            f"{own}linear_fc1.weight": piece(
                "gate_up_proj",
                hidden,
                2 * width,
                select=lambda rows: rows.view(2, width, hidden).permute(2, 1, 0),
            ),
            f"{own}linear_fc1.bias": piece(
                "gate_up_proj_bias", 2 * width, select=lambda row: row.view(2, width).t()
            ),
            f"{own}linear_fc2.weight": piece(
                "down_proj", width, hidden, select=lambda rows: rows.t()
            ),
            f"{own}linear_fc2.bias": piece("down_proj_bias", hidden, select=lambda row: row),
        }


def _types(raw: Raw) -> list[Any]:
    """Kinds of the layers; those of the class where config.json does not say."""
    found: list[Any] | None = raw.get("layer_types")
    if found is not None:
        return found
    layers = range(raw["num_hidden_layers"])
    return ["full_attention" if n % 2 else "sliding_attention" for n in layers]


def _problems(raw: Raw) -> list[str]:
    wanted = {
        "num_local_experts": (int, 2),
        "num_experts_per_tok": (int, 1),
        "swiglu_limit": (int | float, 1e-6),
        "swiglu_alpha": (int | float, 1e-6),
        "sliding_window": (int, 1),
    }
    problems = [
        f"{key}: {raw.get(key)} (a number of at least {least:g} is expected)"
        for key, (kind, least) in wanted.items()
        if not isinstance(raw.get(key), kind) or raw[key] < least
    ]
    if not problems and not 2 <= raw["num_experts_per_tok"] <= raw["num_local_experts"]:
        problems.append(
            f"num_experts_per_tok: {raw['num_experts_per_tok']} of {raw['num_local_experts']} experts"
        )
    layers = raw.get("num_hidden_layers")
    if not isinstance(layers, int):
        return problems
    types = _types(raw)
    problems += [f"layer_types: {kind}" for kind in sorted({str(t) for t in types} - set(_KINDS))]
    if len(types) != layers:
        problems.append(f"layer_types: {len(types)} of them for {layers} layers")
    return problems


def _section(raw: Raw) -> dict[str, Any]:
    kinds = shortest_pattern([_KINDS[kind] for kind in _types(raw)])
    return {
        **attention_biases(raw),
        "attention_sinks": True,
        "attention_layers": kinds,
        "sliding_window": raw["sliding_window"] if "w" in kinds else None,
        "experts": ExpertsConfig(
            number=raw["num_local_experts"],
            per_token=raw["num_experts_per_tok"],
            biases=True,
            swiglu_limit=raw["swiglu_limit"],
            swiglu_alpha=raw["swiglu_alpha"],
        ),
    }


def _keys(model: ModelConfig) -> dict[str, Any]:
    names = {letter: name for name, letter in _KINDS.items()}
    experts = model.experts
    assert experts is not None
    return {
        "attention_bias": model.attention_output_bias,
        "sliding_window": model.sliding_window,
        "layer_types": [names[model.attention_of(number)] for number in range(model.num_layers)],
        "num_local_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "swiglu_limit": experts.swiglu_limit,
        "swiglu_alpha": experts.swiglu_alpha,
        "router_aux_loss_coef": experts.load_balancing,
        "output_router_logits": False,
    }


def _with_yarn(raw: Raw) -> Raw:
    """Rotary embeddings of the class where config.json does not say."""
    if raw.get("rope_parameters") or raw.get("rope_scaling"):
        return raw
    return {**raw, "rope_scaling": _YARN}


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    """Write both forms; the class takes YaRN where there is none."""
    found = rope_config(model)
    scaling = found["rope_scaling"] or {"rope_type": "default"}
    return {**found, "rope_parameters": {**scaling, "rope_theta": found["rope_theta"]}}


def _cannot_write(model: ModelConfig) -> str | None:
    assert model.experts is not None
    if not model.experts.weights_of_chosen:
        return "experts.weights_of_chosen: False; gpt_oss weighs by the chosen experts' logits"
    return half_of_the_biases(model)


FAMILIES = (
    llama_like(
        model_type="gpt_oss",
        title="gpt-oss",
        architecture="GptOssForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "sliding_window": 128,
        },
        keys=_keys,
        always=frozenset({"attention_sinks", "experts", EXPERT_BIASES, CLAMPED_SWIGLU}),
        options=ATTENTION_BIASES | {WINDOW},
        section=_section,
        problems=_problems,
        cannot_write=_cannot_write,
        tensors=GptOssTensors,
        unpruned=UNPRUNED_EXPERTS,
        experts=True,
        rotary=(
            lambda raw: rope_problems(_with_yarn(raw)),
            lambda raw: rope_section(_with_yarn(raw)),
            _rotary_config,
        ),
    ),
)
