"""The families that are pruned, written out in float64 loops, and small folders of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

Array = npt.NDArray[np.float64]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "head_dim": 6,
    "pad_token_id": None,
}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
GEMMA3: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 5,
    "query_pre_attn_scalar": 10,
    "layer_types": KINDS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "olmo2": {},
    "phi3": {},
    "phi3 partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.7}},
    "olmo3": {"sliding_window": 5, "layer_types": KINDS},
    "gemma2": {
        **GEMMA3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {**GEMMA3, "tie_word_embeddings": True},
    "gemma3_text untied": {**GEMMA3, "tie_word_embeddings": False},
}
"""Name, which begins with a model_type -> what its config.json has beside `SIZES`."""

PLACES: dict[str, tuple[str, str, str, str]] = {
    "olmo": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "gemma": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "": ("input_layernorm", "", "post_attention_layernorm", ""),
}
"""Beginning of a model_type -> norms before and after attention, before and after the feed-forward block."""


def weights_of(layer: Any) -> dict[str, torch.Tensor]:
    """The weights of a layer's projections, q to v and gate and up; parts of one tensor where a family joins them."""
    config = layer.self_attn.config
    found = {name: getattr(layer.self_attn, f"{name}_proj", None) for name in "qkv"}
    found |= {name: getattr(layer.mlp, f"{name}_proj", None) for name in ("gate", "up")}
    if found["q"] is not None:
        return {name: linear.weight for name, linear in found.items()}
    rows = [6 * config.num_attention_heads, *[6 * config.num_key_value_heads] * 2]
    parts = [
        *layer.self_attn.qkv_proj.weight.split(rows),
        *layer.mlp.gate_up_proj.weight.chunk(2),
    ]
    return dict(zip(found, parts, strict=True))


def exists(name: str) -> bool:
    """Whether this transformers has a family."""
    return name.split()[0] in transformers.CONFIG_MAPPING


def make_model(family: str, **changes: Any) -> Any:
    """A random causal LM in fp32, norms and biases included."""
    settings = {**SIZES, **FAMILIES[family], **changes}
    config = transformers.AutoConfig.for_model(family.split()[0], **settings)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What is computed of a model: layers, and ones where a channel or head is kept."""

    layers: tuple[int, ...]
    hidden: Array
    heads: dict[int, Array]
    groups: dict[int, Array]
    ffn: dict[int, Array]


def everything(config: Any) -> Masks:
    layers = tuple(range(config.num_hidden_layers))
    return Masks(
        layers=layers,
        hidden=np.ones(config.hidden_size),
        heads=dict.fromkeys(layers, np.ones(config.num_attention_heads)),
        groups=dict.fromkeys(layers, np.ones(config.num_key_value_heads)),
        ffn=dict.fromkeys(layers, np.ones(config.intermediate_size)),
    )


class Reference:
    """A model's forward pass, one sequence at a time, with all that is scored."""

    def __init__(self, model: Any, masks: Masks | None = None) -> None:
        self.config = config = model.config
        self.masks = masks or everything(config)
        self.weights = {n: t.double().numpy() for n, t in model.state_dict().items()}
        for number, layer in enumerate(model.model.layers):
            for name, weight in weights_of(layer).items():
                block = "mlp" if name in ("gate", "up") else "self_attn"
                place = f"model.layers.{number}.{block}.{name}_proj.weight"
                self.weights[place] = weight.detach().double().numpy()
        kind = config.model_type
        self.places = next(p for start, p in PLACES.items() if kind.startswith(start))
        self.is_gemma, self.is_olmo = kind.startswith("gemma"), kind.startswith("olmo")
        self.rotary = model.model.rotary_emb

    def norm(self, x: Array, name: str, mask: Array | None = None) -> Array:
        """Over the channels of the last axis that a mask keeps."""
        mask = np.ones(x.shape[-1]) if mask is None else mask
        square = (x**2 * mask).sum(axis=-1, keepdims=True) / mask.sum()
        weight = self.weights[name] + (1.0 if self.is_gemma else 0.0)
        return x / np.sqrt(square + self.config.rms_norm_eps) * weight * mask

    def run(self, tokens: list[int]) -> dict[str, Any]:
        """points: inputs of the layers, and the last one's output [n + 1][L, H]; inputs: of norms by weight [L, C];
        branches: what attention and feed-forward blocks read [2 n][L, H]; heads [n][L, h, d]; ffn [n][L, F]; logits
        [L, V].
        """
        masks = self.masks
        x = self.weights["model.embed_tokens.weight"][tokens] * masks.hidden
        x = x * (self.config.hidden_size**0.5 if self.is_gemma else 1.0)
        seen: dict[str, Any] = {"points": [], "inputs": {}, "branches": [], "heads": [], "ffn": []}
        for layer in masks.layers:
            seen["points"].append(x)
            for branch, block in enumerate((self._attention, self._feed_forward)):
                before, after = self.places[2 * branch : 2 * branch + 2]
                y = self._seen_norm(x, layer, before, seen)
                seen["branches"].append(y)
                x = x + self._seen_norm(block(y, layer, seen) * masks.hidden, layer, after, seen)
        seen["points"].append(x)
        seen["inputs"]["model.norm.weight"] = x
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        last = self.norm(x, "model.norm.weight", masks.hidden)
        seen["logits"] = capped(
            last @ self.weights[head].T, getattr(self.config, "final_logit_softcapping", None)
        )
        return seen

    def _seen_norm(self, x: Array, layer: int, place: str, seen: dict[str, Any]) -> Array:
        if not place:
            return x
        name = f"model.layers.{layer}.{place}.weight"
        seen["inputs"][name] = x
        return self.norm(x, name, self.masks.hidden)

    def _feed_forward(self, y: Array, layer: int, seen: dict[str, Any]) -> Array:
        here = f"model.layers.{layer}.mlp."
        gate, up = (y @ self.weights[f"{here}{kind}_proj.weight"].T for kind in ("gate", "up"))
        if self.is_gemma:
            inner = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            inner = gate / (1 + np.exp(-gate))
        seen["ffn"].append(inner * up * self.masks.ffn[layer])
        return seen["ffn"][-1] @ self.weights[here + "down_proj.weight"].T

    def _attention(self, y: Array, layer: int, seen: dict[str, Any]) -> Array:
        config, width, length = self.config, SIZES["head_dim"], len(y)
        here, masks = f"model.layers.{layer}.self_attn.", self.masks
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * (layer + 1))[layer]
        parts = {}
        for letter in "qkv":
            name = f"{here}{letter}_proj."
            z = y @ self.weights[name + "weight"].T + self.weights.get(name + "bias", 0.0)
            norm = f"{here}{letter}_norm.weight"
            if self.is_olmo and norm in self.weights:
                seen["inputs"][norm] = z
                kept = masks.heads[layer] if letter == "q" else masks.groups[layer]
                z = self.norm(z, norm, np.repeat(kept, width))
            z = z.reshape(length, -1, width)
            if not self.is_olmo and norm in self.weights:
                z = self.norm(z, norm)
            parts[letter] = z if letter == "v" else self._rotated(z, layer, kind)
        scaling = config.rope_parameters or {}
        if beta := scaling.get("llama_4_scaling_beta"):
            far = np.floor(np.arange(length) / scaling["original_max_position_embeddings"])
            parts["q"] = parts["q"] * (1 + beta * np.log(1 + far))[:, None, None]
        scale = getattr(config, "query_pre_attn_scalar", width) ** -0.5
        window = config.sliding_window if kind == "sliding_attention" else length
        ratio = config.num_attention_heads // config.num_key_value_heads
        out = np.zeros((length, config.num_attention_heads, width))
        for head in np.flatnonzero(masks.heads[layer]):
            for at in range(length):
                places = slice(max(0, at + 1 - window), at + 1)
                scores = parts["k"][places, head // ratio] @ parts["q"][at, head] * scale
                scores = capped(scores, getattr(config, "attn_logit_softcapping", None))
                share = np.exp(scores - scores.max())
                out[at, head] = share / share.sum() @ parts["v"][places, head // ratio]
        seen["heads"].append(out)
        return out.reshape(length, -1) @ self.weights[here + "o_proj.weight"].T

    def _rotated(self, z: Array, layer: int, kind: str) -> Array:
        """RoPE in halves; [L, heads, d]. Angles are those of transformers, which no pruning changes."""
        turned = getattr(self.config, "no_rope_layers", None)
        if turned and not turned[layer]:
            return z
        length = len(z)
        by_kind = "layer_type" in inspect.signature(type(self.rotary).forward).parameters
        tables = self.rotary(
            torch.zeros(1, length, 1), torch.arange(length)[None], *([kind] if by_kind else [])
        )
        half = tables[0].shape[-1] // 2
        cos, sin = (t[0, :, None, :half].double().numpy() for t in tables)
        first, second, rest = z[..., :half], z[..., half : 2 * half], z[..., 2 * half :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)
