"""GPT-2: LayerNorm, biases, learned positions; matrices are stored transposed, and q, k, v side by side."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import Family, Raw, general_problems
from distill_pretrain.checkpoint.hf.tensors import Correspondence, Piece, whole
from distill_pretrain.mcore.model.config import ModelConfig

_ACTIVATIONS = {"gelu": None, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Of config.json -> of the section model."""
_SIZES = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")


def _problems(raw: Raw) -> list[str]:
    problems = general_problems(raw)
    problems += [f"{key} is missing" for key in _SIZES if raw.get(key) is None]
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        problems.append(f"activation_function: {activation} (supported: {supported})")
    wanted = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    problems += [f"{k}: {raw[k]}" for k, value in wanted.items() if raw.get(k, value) != value]
    return problems


def _section(raw: Raw) -> ModelConfig:
    return ModelConfig(
        arch="gpt2",
        num_layers=raw["n_layer"],
        hidden_size=raw["n_embd"],
        ffn_hidden_size=raw.get("n_inner") or 4 * int(raw["n_embd"]),
        num_attention_heads=raw["n_head"],
        activation=_ACTIVATIONS[raw.get("activation_function", "gelu_new")],
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
        init_std=raw.get("initializer_range") or 0.02,
    )


def _cannot_write(model: ModelConfig) -> str | None:
    heads = model.num_attention_heads
    width = model.kv_channels or model.hidden_size // heads
    groups = model.num_query_groups or heads
    if groups == heads and width * heads == model.hidden_size:
        return f"activation: {model.activation}" if model.activation == "silu" else None
    return f"{heads} query heads, {groups} key/value heads of width {width}; gpt2 has as many, of width hidden / heads"


def _config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": max_positions,
        # GPT-2 itself has the tanh approximation, gelu_new.
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


class GPT2Tensors(Correspondence):
    """GPT-2: matrices are stored transposed, and q, k, v side by side."""

    tied_tensors = ("lm_head.weight", "transformer.wte.weight")

    def outside_layers(self) -> tuple[dict[str, list[Piece]], dict[str, list[Piece]]]:
        """Return the pieces of the embeddings, of the final norm and of the head."""
        hidden = self.model.hidden_size
        before = {
            "embedding.word_embeddings.weight": self.vocabulary("transformer.wte.weight"),
            "embedding.position_embeddings.weight": whole(
                "transformer.wpe.weight", self.max_positions, hidden
            ),
        }
        after = {
            f"decoder.final_layernorm.{kind}": whole(f"transformer.ln_f.{kind}", hidden)
            for kind in ("weight", "bias")
        }
        if not self.model.tie_embeddings:
            after["output_layer.weight"] = self.vocabulary("lm_head.weight")
        return before, after

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer's norms, attention and feed-forward block."""
        here = f"transformer.h.{number}."
        hidden, ffn = self.model.hidden_size, self.model.ffn_hidden_size
        pieces: dict[str, list[Piece]] = {}
        for norm, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            for kind in ("weight", "bias"):
                pieces[f"{norm}.{kind}"] = whole(f"{here}{name}.{kind}", hidden)
        pieces["self_attention.linear_qkv.weight"] = self._qkv(here, "weight", hidden)
        pieces["self_attention.linear_qkv.bias"] = self._qkv(here, "bias")
        pieces["mlp.linear_fc1.weight"] = [
            Piece(tensor=here + "mlp.c_fc.weight", shape=(hidden, ffn), split=1, transposed=True)
        ]
        pieces["mlp.linear_fc1.bias"] = [
            Piece(tensor=here + "mlp.c_fc.bias", shape=(ffn,), split=0)
        ]
        for linear, name, width in (
            ("self_attention.linear_proj", "attn.c_proj", hidden),
            ("mlp.linear_fc2", "mlp.c_proj", ffn),
        ):
            pieces[f"{linear}.weight"] = [
                Piece(
                    tensor=f"{here}{name}.weight", shape=(width, hidden), split=0, transposed=True
                )
            ]
            pieces[f"{linear}.bias"] = whole(f"{here}{name}.bias", hidden)
        return pieces

    def _qkv(self, here: str, kind: str, *rows: int) -> list[Piece]:
        hidden = self.model.hidden_size
        return [
            Piece(
                tensor=f"{here}attn.c_attn.{kind}",
                shape=(*rows, 3 * hidden),
                select=self.head_of_kind(name),
                split=len(rows),
                start=i * hidden,
                length=hidden,
                transposed=bool(rows),
            )
            for i, name in enumerate("qkv")
        ]


FAMILIES = (
    Family(
        model_type="gpt2",
        title="GPT-2",
        architecture="GPT2LMHeadModel",
        arch="gpt2",
        tensors=GPT2Tensors,
        section=_section,
        config=_config,
        problems=_problems,
        options=frozenset({"activation"}),
        cannot_write=_cannot_write,
        unpruned="norms that subtract a mean are not corrected for channels that go",
        longest="n_positions",
    ),
)
