"""config.json to and from the section `model`; what megatron-core cannot represent is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.errors import CheckpointError
from distill_pretrain.mcore.model.config import ModelConfig

CONFIG = "config.json"
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# What transformers takes for a key that config.json does not have, where the families differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_GPT2_SIZES = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
_LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """What the config.json of a Hugging Face folder describes.

    Attributes:
        model: the same architecture as a section `model`.
        vocab_size: V, rows of the embedding.
        max_positions: longest sequence the model was made for; of a gpt2 model the number of learned positions.
        dtype: "fp32", "bf16" or "fp16", of the stored weights.
        family: model_type.
    """

    model: ModelConfig
    vocab_size: int
    max_positions: int
    dtype: str
    family: str


def read_hf_model(path: Path) -> HFModel:
    """Describe the model of a Hugging Face folder, from its config.json alone.

    Raises:
        CheckpointError: no such folder, or a model that megatron-core cannot represent; lists every reason.
    """
    raw = _read_json(path / CONFIG)
    problems = _problems(raw)
    if problems:
        raise _unsupported(path, problems)
    family = raw["model_type"]
    try:
        return HFModel(
            model=_gpt2_model(raw) if family == "gpt2" else _llama_model(raw),
            vocab_size=int(raw["vocab_size"]),
            max_positions=int(raw["n_positions" if family == "gpt2" else _SIZES[-1]]),
            dtype=DTYPE_NAMES[_dtype(raw)],
            family=family,
        )
    except (ValueError, TypeError) as error:
        raise _unsupported(path, [str(error)]) from None


def hf_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    dtype: str,
    eod_id: int | None = None,
    bos_id: int | None = None,
) -> dict[str, Any]:
    """Make the config.json of a model of this project.

    Args:
        model: architecture.
        vocab_size: V, without padding.
        max_positions: longest sequence it was trained on.
        dtype: "fp32" or "bf16", of the weights beside it.
        eod_id: token that ends a document.
        bos_id: token that began every document it was trained on; None where there was none.

    Raises:
        CheckpointError: no class of transformers computes this model.
    """
    if model.norm_placement != "pre":
        raise CheckpointError(
            "no class of transformers computes this model",
            where="model.norm_placement",
            found=model.norm_placement,
            expected="pre",
        )
    names = {short: name for name, short in DTYPE_NAMES.items()}
    common = {
        "vocab_size": vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": names[dtype],
        "bos_token_id": bos_id,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "use_cache": True,
    }
    if model.arch == "gpt2":
        return {**common, **_gpt2_config(model, max_positions)}
    return {**common, **_llama_config(model, max_positions)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        raise CheckpointError(
            "not a Hugging Face model folder",
            where=path.parent,
            expected=f"a local folder with {CONFIG} and *.safetensors",
            remedy="download the model first and name its folder",
        ) from None
    except ValueError as error:
        raise CheckpointError("the file is no valid JSON", where=path, found=error) from None
    if not isinstance(raw, dict):
        raise CheckpointError("the file is no JSON object", where=path)
    return raw


def _unsupported(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "megatron-core cannot run this model as it is:\n" + "\n".join(f"  - {p}" for p in problems),
        where=path / CONFIG,
        expected=f"one of {', '.join((*_DEFAULTS, 'gpt2'))} with plain causal attention",
        remedy="a teacher may run with teacher.kind: hf instead; a student cannot start from it",
    )


def _get(raw: dict[str, Any], key: str) -> Any:
    return raw.get(key, _DEFAULTS[raw["model_type"]].get(key))


def _dtype(raw: dict[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def _problems(raw: dict[str, Any]) -> list[str]:
    family = raw.get("model_type")
    problems = _general_problems(raw)
    if family == "gpt2":
        return problems + _gpt2_problems(raw)
    if family not in _DEFAULTS:
        return [f"model_type: {family} is not supported", *problems]
    problems += [f"{key} is missing" for key in _SIZES if raw.get(key) is None]
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act: {raw['hidden_act']} (silu is supported)")
    if raw.get("attention_bias"):
        problems.append("attention_bias: true puts a bias on o_proj")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias: true puts biases on the feed-forward block")
    return problems + _head_problems(raw) + _window_problems(raw) + _rope_problems(raw)


def _head_problems(raw: dict[str, Any]) -> list[str]:
    """Widths of heads that attention cannot be computed with."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return []
    width, groups = _get(raw, "head_dim"), _get(raw, "num_key_value_heads") or heads
    problems = []
    if width is None and hidden % heads:
        problems.append(f"hidden_size: {hidden} is no multiple of num_attention_heads: {heads}")
    elif isinstance(width or hidden, int) and (width or hidden // heads) % 2:
        problems.append(f"head_dim: {width or hidden // heads} is odd, and RoPE turns pairs")
    if isinstance(groups, int) and groups > 0 and heads % groups:
        problems.append(f"num_key_value_heads: {groups} does not divide {heads} attention heads")
    return problems


def _general_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    architectures = raw.get("architectures") or []
    if architectures and not any(
        str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures
    ):
        problems.append(f"architectures: {', '.join(map(str, architectures))} is no causal LM")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        problems.append("auto_map: the model brings its own code")
    experts = [k for k in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(k)]
    problems += [f"{key}: {raw[key]} (mixture of experts)" for key in experts]
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        problems.append(f"quantization_config: the weights are quantised ({method})")
    if _dtype(raw) not in DTYPE_NAMES:
        problems.append(f"dtype: {_dtype(raw)} (supported: {', '.join(DTYPE_NAMES)})")
    return problems


def _window_problems(raw: dict[str, Any]) -> list[str]:
    """Attention that does not see all earlier positions."""
    layers, longest = raw.get("num_hidden_layers"), raw.get("max_position_embeddings")
    other = sorted({str(kind) for kind in raw.get("layer_types") or []} - {"full_attention"})
    if other:
        return [f"layer_types: {', '.join(other)}"]
    window = _get(raw, "sliding_window")
    if not isinstance(window, int) or (isinstance(longest, int) and window >= longest):
        return []
    if raw["model_type"] == "mistral":
        return [f"sliding_window: {window} is in use"]
    first = _get(raw, "max_window_layers")
    if raw.get("use_sliding_window") and isinstance(layers, int) and (first or 0) < layers:
        return [f"use_sliding_window: sliding_window: {window} is in use from layer {first} on"]
    return []


def _rope(raw: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """RoPE base and scaling, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes them."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        return None, {"rope_type": f"{scaling}"}
    return scaling.get("rope_theta", raw.get("rope_theta", 10000)), scaling


def _rope_kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _rope_problems(raw: dict[str, Any]) -> list[str]:
    base, scaling = _rope(raw)
    if any(isinstance(value, dict) for value in scaling.values()):
        return ["rope_parameters: different ones for different layers"]
    problems = []
    if not isinstance(base, int | float) or base < 1 or int(base) != base:
        problems.append(f"rope_theta: {base} (a whole number is supported)")
    kind = _rope_kind(scaling)
    if kind == "llama3":
        wrong = [f"{k} {scaling.get(k)}" for k, v in _LLAMA3_ROPE.items() if scaling.get(k) != v]
        if wrong:
            expected = ", ".join(f"{key} {value}" for key, value in _LLAMA3_ROPE.items())
            problems.append(f"llama3 rope scaling with {', '.join(wrong)} (supported: {expected})")
        if not isinstance(scaling.get("factor"), int | float):
            problems.append(f"llama3 rope scaling with factor {scaling.get('factor')}")
    elif kind != "default":
        problems.append(f"{kind} rope scaling (supported: none, or llama3)")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor: {partial}")
    return problems


def _gpt2_problems(raw: dict[str, Any]) -> list[str]:
    problems = [f"{key} is missing" for key in _GPT2_SIZES if raw.get(key) is None]
    activation = raw.get("activation_function", "gelu_new")
    if activation != "gelu":
        problems.append(f"activation_function: {activation} (gelu, the exact one, is supported)")
    wanted = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    problems += [f"{k}: {raw[k]}" for k, value in wanted.items() if raw.get(k, value) != value]
    return problems


def _llama_model(raw: dict[str, Any]) -> ModelConfig:
    base, scaling = _rope(raw)
    heads = int(raw["num_attention_heads"])
    return ModelConfig(
        arch="llama",
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_get(raw, "num_key_value_heads") or heads,
        kv_channels=_get(raw, "head_dim") or int(raw["hidden_size"]) // heads,
        rotary_base=int(base),
        rope_scaling_factor=scaling["factor"] if _rope_kind(scaling) == "llama3" else None,
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        init_std=raw.get("initializer_range") or 0.02,
    )


def _gpt2_model(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        arch="gpt2",
        num_layers=raw["n_layer"],
        hidden_size=raw["n_embd"],
        ffn_hidden_size=raw.get("n_inner") or 4 * int(raw["n_embd"]),
        num_attention_heads=raw["n_head"],
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
        init_std=raw.get("initializer_range") or 0.02,
    )


def _llama_config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    if model.qkv_bias and model.qk_norm:
        raise CheckpointError(
            "no class of transformers computes this model",
            where="model.qkv_bias, model.qk_norm",
            found="both",
            expected="at most one: Qwen2 has the biases, Qwen3 the norms",
        )
    scaling = None
    if model.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3_ROPE}
    heads = model.num_attention_heads
    return {
        **_family_keys(model),
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": model.kv_channels or model.hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_epsilon,
        # The keys of transformers 4, which 5 reads too.
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
    }


def _family_keys(model: ModelConfig) -> dict[str, Any]:
    if model.qkv_bias:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": False,
        }
    if model.qk_norm:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "use_sliding_window": False,
        }
    if model.hidden_size % model.num_attention_heads:
        # LlamaConfig refuses such a width, though the model would run.
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": None,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _gpt2_config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    heads = model.num_attention_heads
    head_dim = model.kv_channels or model.hidden_size // heads
    groups = model.num_query_groups or heads
    if groups != heads or head_dim * heads != model.hidden_size:
        raise CheckpointError(
            "no class of transformers computes this gpt2 model",
            where="model.num_query_groups, model.kv_channels",
            found=f"{heads} query heads, {groups} key/value heads of width {head_dim}",
            expected=f"as many key/value heads, of width {model.hidden_size} / {heads}",
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": heads,
        "n_positions": max_positions,
        # megatron-core computes the exact GELU; GPT-2 itself used the tanh approximation, gelu_new.
        "activation_function": "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }
