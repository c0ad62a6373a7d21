"""Llama, Qwen2 and Qwen3 written out in float64 loops, and small folders of them."""

from __future__ import annotations

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
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
}


def make_model(family: str, **changes: Any) -> Any:
    """A random causal LM in fp32, norms and biases included."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
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


class Reference:
    """A model's forward pass, one sequence at a time, with all that is scored."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights = {n: t.double().numpy() for n, t in model.state_dict().items()}

    def norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return x / scale * self.weights[name]

    def run(self, tokens: list[int]) -> dict[str, Any]:
        """points: inputs of the layers, and the last one's output [n + 1][L, H]; norms: outputs by weight [L, H];
        heads [n][L, h, d]; ffn [n][L, F]; logits [L, V].
        """
        x = self.weights["model.embed_tokens.weight"][tokens]
        seen: dict[str, Any] = {"points": [], "norms": {}, "inputs": {}, "heads": [], "ffn": []}
        for layer in range(self.config.num_hidden_layers):
            here = f"model.layers.{layer}."
            seen["points"].append(x)
            x = x + self._attention(
                self._seen_norm(x, here + "input_layernorm.weight", seen), here, seen
            )
            y = self._seen_norm(x, here + "post_attention_layernorm.weight", seen)
            gate, up = (
                y @ self.weights[f"{here}mlp.{kind}_proj.weight"].T for kind in ("gate", "up")
            )
            inner = gate / (1 + np.exp(-gate)) * up
            seen["ffn"].append(inner)
            x = x + inner @ self.weights[here + "mlp.down_proj.weight"].T
        seen["points"].append(x)
        last = self._seen_norm(x, "model.norm.weight", seen)
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        seen["logits"] = last @ self.weights[head].T
        return seen

    def _seen_norm(self, x: Array, name: str, seen: dict[str, Any]) -> Array:
        seen["inputs"][name] = x
        seen["norms"][name] = self.norm(x, name)
        return seen["norms"][name]

    def _attention(self, y: Array, here: str, seen: dict[str, Any]) -> Array:
        config, width = self.config, SIZES["head_dim"]
        length = len(y)
        parts = {}
        for kind in "qkv":
            name = f"{here}self_attn.{kind}_proj."
            z = y @ self.weights[name + "weight"].T + self.weights.get(name + "bias", 0.0)
            z = z.reshape(length, -1, width)
            if f"{here}self_attn.{kind}_norm.weight" in self.weights:
                z = self.norm(z, f"{here}self_attn.{kind}_norm.weight")
            parts[kind] = z if kind == "v" else rotated(z)
        ratio = config.num_attention_heads // config.num_key_value_heads
        out = np.zeros((length, config.num_attention_heads, width))
        for head in range(config.num_attention_heads):
            for at in range(length):
                keys = parts["k"][: at + 1, head // ratio]
                scores = keys @ parts["q"][at, head] / np.sqrt(width)
                share = np.exp(scores - scores.max())
                out[at, head] = share / share.sum() @ parts["v"][: at + 1, head // ratio]
        seen["heads"].append(out)
        return out.reshape(length, -1) @ self.weights[here + "self_attn.o_proj.weight"].T


def rotated(z: Array) -> Array:
    """RoPE of base 10000 in halves; [L, heads, d]."""
    length, _, width = z.shape
    half = width // 2
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = z[..., :half], z[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
