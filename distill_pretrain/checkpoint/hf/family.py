"""What a family of models says of itself: its pieces, its key map, its refusals. Each is a module of `families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill_pretrain.checkpoint.hf.tensors import Correspondence
from distill_pretrain.mcore.init.deep import activation_of
from distill_pretrain.mcore.model.config import ModelConfig

Raw = Mapping[str, Any]
"""A config.json."""

DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_KEYS = (
    "activation",
    "attention_logit_cap",
    "attention_output_bias",
    "attention_sinks",
    "attention_scale_width",
    "attention_temperature",
    "embedding_scale",
    "experts",
    "logit_cap",
    "mlp_bias",
    "qk_norm",
    "qk_norm_whole",
    "qkv_bias",
    "rope_linear_factor",
    "rope_scaling_factor",
    "rotary_fraction",
    "windowed_rotary_base",
    "yarn",
    "zero_centred_norms",
)
NO_ROPE, WINDOW = "attention_layers: n", "attention_layers: w"
EXPERT_BIASES, CLAMPED_SWIGLU = "experts: biases", "experts: swiglu_limit"
UNPRUNED_EXPERTS = "what each expert does is not scored"
"""Why `prune` takes no family with experts."""
REORDERED, SANDWICH = "norm_placement: reordered", "norm_placement: sandwich"


def pieces_of(model: ModelConfig) -> frozenset[str]:
    """Return the keys, or `key: value`, in which a model differs from a plain one of its `arch`."""
    fields = ModelConfig.model_fields
    found = {name for name in _KEYS if getattr(model, name) != fields[name].default}
    if model.activation == activation_of(model.model_copy(update={"activation": None}))[1]:
        found -= {"activation"}
    found |= {f"attention_layers: {kind}" for kind in model.attention_kinds - {"f"}}
    if model.experts is not None and model.experts.biases:
        found.add(EXPERT_BIASES)
    if model.experts is not None and model.experts.swiglu_limit is not None:
        found.add(CLAMPED_SWIGLU)
    if model.norm_placement != "pre":
        found.add(f"norm_placement: {model.norm_placement}")
    return frozenset(found)


def shortest_pattern(kinds: Sequence[str]) -> str:
    """Return the shortest `model.attention_layers` that gives the layers these letters."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return "".join(kinds[:length])
    return "".join(kinds)


def nothing_more(raw: Raw) -> list[str]:
    """Refuse nothing."""
    return []


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family that megatron-core computes: a student, a teacher of kind megatron, an export.

    Attributes:
        model_type: in config.json.
        title: its name for readers.
        architecture: class of transformers.
        arch: `model.arch` of its models.
        tensors: its key map.
        section: config.json without problems -> the section model.
        config: (model, longest sequence) -> the keys of config.json that are not of every family.
        problems: what of a config.json cannot be computed, a line each.
        always: pieces (`pieces_of`) that every model of the family has.
        options: pieces that it may have.
        cannot_write: why a model with these pieces is not one of its class; None where it is.
        unpruned: why `prune` does not take it; None where it does.
        longest: key of config.json that says the longest sequence.
    """

    model_type: str
    title: str
    architecture: str
    arch: Literal["llama", "gpt2"]
    tensors: type[Correspondence]
    section: Callable[[Raw], ModelConfig]
    config: Callable[[ModelConfig, int], dict[str, Any]]
    problems: Callable[[Raw], list[str]]
    always: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    cannot_write: Callable[[ModelConfig], str | None] = lambda model: None
    unpruned: str | None = None
    longest: str = "max_position_embeddings"

    def has(self, model: ModelConfig) -> bool:
        """Say whether its class of transformers computes a model."""
        found = pieces_of(model)
        fits = model.arch == self.arch and self.always <= found <= self.always | self.options
        return fits and self.cannot_write(model) is None


@dataclass(frozen=True, kw_only=True)
class TeacherOnly:
    """A family that megatron-core does not compute here: a teacher of kind hf, and nothing else.

    Attributes:
        model_type: in config.json.
        title: its name for readers.
        reason: what is missing.
    """

    model_type: str
    title: str
    reason: str


def dtype_of(raw: Raw) -> str:
    """Return the type of the stored weights, as transformers names it."""
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    *(f"n_{name}" for name in ("embd", "layer", "head", "inner", "positions")),
)
_OTHER_TYPES: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list"),
    "auto_map": (dict, "an object"),
    "layer_types": (list, "a list"),
    "no_rope_layers": (list, "a list"),
    "quantization_config": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "activation_function": (str, "a word"),
    "hidden_act": (str, "a word"),
}


def wrong_types(raw: Raw) -> list[str]:
    """Say which values of a config.json are none that its keys can have, a line each; others can be looked at then."""
    problems = []
    for key in _SIZES:
        value = raw.get(key)
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key}: {value!r} (a whole number above 0 is expected)")
    for key, (kind, words) in _OTHER_TYPES.items():
        if raw.get(key) is not None and not isinstance(raw[key], kind):
            problems.append(f"{key}: {raw[key]!r} ({words} is expected)")
    rope = raw.get("rope_parameters")
    for layers in ("full_attention", "sliding_attention"):
        if isinstance(rope, dict) and not isinstance(rope.get(layers, {}), dict):
            problems.append(f"rope_parameters: {layers}: {rope[layers]!r} (an object is expected)")
    return problems


_DEQUANTISED = {
    "mxfp4": "; transformers stores them in bf16: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(OTHER)"
}
"""Method of quantising -> how to undo it."""


def general_problems(raw: Raw, *, experts: bool = False) -> list[str]:
    """Say what no family can be.

    Args:
        raw: config.json.
        experts: whether the family has experts.
    """
    problems = []
    architectures = raw.get("architectures") or []
    if architectures and not any(
        str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures
    ):
        problems.append(f"architectures: {', '.join(map(str, architectures))} is no causal LM")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        problems.append("auto_map: the model brings its own code")
    counts = [k for k in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(k)]
    problems += [f"{key}: {raw[key]} (mixture of experts)" for key in counts if not experts]
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        remedy = _DEQUANTISED.get(str(method), "")
        problems.append(f"quantization_config: the weights are quantised ({method}){remedy}")
    if dtype_of(raw) not in DTYPE_NAMES:
        problems.append(f"dtype: {dtype_of(raw)} (supported: {', '.join(DTYPE_NAMES)})")
    return problems
