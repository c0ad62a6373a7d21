"""Qwen3-MoE: Qwen3 with experts in the place of every feed-forward block."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import UNPRUNED_EXPERTS, Raw
from distill_pretrain.checkpoint.hf.llama_like import (
    ATTENTION_BIASES,
    attention_biases,
    half_of_the_biases,
    llama_like,
    only_full_layers,
)
from distill_pretrain.checkpoint.hf.tensors import ExpertTensors
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.mcore.model.parts import ExpertsConfig


def _number(raw: Raw) -> Any:
    """Experts of a layer: transformers 5 reads both names."""
    return raw.get("num_experts", raw.get("num_local_experts"))


def _problems(raw: Raw) -> list[str]:
    problems = only_full_layers(raw)
    if raw.get("use_sliding_window") and raw.get("sliding_window"):
        problems.append(f"use_sliding_window: sliding_window: {raw['sliding_window']} is in use")
    if raw.get("mlp_only_layers"):
        problems.append(f"mlp_only_layers: {raw['mlp_only_layers']} (experts in all layers)")
    if raw.get("decoder_sparse_step") != 1:
        problems.append(f"decoder_sparse_step: {raw.get('decoder_sparse_step')} (1 is supported)")
    sizes = {
        "num_experts": _number(raw),
        "num_experts_per_tok": raw.get("num_experts_per_tok"),
        "moe_intermediate_size": raw.get("moe_intermediate_size"),
    }
    wrong = [
        f"{key}: {value} (a whole number above 0 is expected)"
        for key, value in sizes.items()
        if not isinstance(value, int) or value < 1
    ]
    if not wrong and raw["num_experts_per_tok"] > _number(raw):
        wrong.append(f"num_experts_per_tok: {raw['num_experts_per_tok']} of {_number(raw)} experts")
    return problems + wrong


def _section(raw: Raw) -> dict[str, Any]:
    return {
        **attention_biases(raw),
        "qk_norm": True,
        "ffn_hidden_size": raw["moe_intermediate_size"],
        "experts": ExpertsConfig(
            number=_number(raw),
            per_token=raw["num_experts_per_tok"],
            weights_of_chosen=bool(raw["norm_topk_prob"]),
        ),
    }


def _keys(model: ModelConfig) -> dict[str, Any]:
    experts = model.experts
    assert experts is not None
    return {
        "attention_bias": model.attention_output_bias,
        "use_sliding_window": False,
        "num_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": model.ffn_hidden_size,
        "norm_topk_prob": experts.weights_of_chosen,
        "router_aux_loss_coef": experts.load_balancing,
        "output_router_logits": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


FAMILIES = (
    llama_like(
        model_type="qwen3_moe",
        title="Qwen3-MoE",
        architecture="Qwen3MoeForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        keys=_keys,
        always=frozenset({"qk_norm", "experts"}),
        options=ATTENTION_BIASES,
        section=_section,
        problems=_problems,
        cannot_write=half_of_the_biases,
        tensors=ExpertTensors,
        unpruned=UNPRUNED_EXPERTS,
        experts=True,
    ),
)
