"""Phi-3 and Phi-4: Llama with q, k, v in one tensor, gate and up in another, and perhaps channels that do not turn."""

from __future__ import annotations

from typing import Any

from distill_pretrain.checkpoint.hf.family import WINDOW, Raw
from distill_pretrain.checkpoint.hf.llama_like import llama_like, only_full_layers, used_window
from distill_pretrain.checkpoint.hf.rope import (
    kind_of,
    partial_of,
    rope_config,
    rope_of,
    rope_problems,
    rope_section,
)
from distill_pretrain.checkpoint.hf.tensors import LlamaTensors, Piece, half
from distill_pretrain.mcore.model.config import ModelConfig


class Phi3Tensors(LlamaTensors):
    """Llama's, but for the tensors that hold several projections, one after the other."""

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer."""
        here, ffn = f"model.layers.{number}.", self.model.ffn_hidden_size
        shape = (2 * ffn, self.model.hidden_size)
        tensor = f"{here}mlp.gate_up_proj.weight"
        return {
            **super().in_layer(number),
            "mlp.linear_fc1.weight": [
                Piece(
                    tensor=tensor, shape=shape, select=half(i), split=0, start=i * ffn, length=ffn
                )
                for i in range(2)
            ],
        }

    def _qkv(self, here: str, kind: str, *columns: int) -> list[Piece]:
        rows = {"q": self.heads, "k": self.groups, "v": self.groups}
        shape = (sum(rows.values()) * self.head_dim, *columns)
        pieces, start = [], 0
        for name, heads in rows.items():
            pieces.append(
                Piece(
                    tensor=f"{here}self_attn.qkv_proj.{kind}",
                    shape=shape,
                    select=self.head_of_kind(name),
                    split=0,
                    start=start,
                    length=heads * self.head_dim,
                )
            )
            start += heads * self.head_dim
        return pieces


def _section(raw: Raw) -> dict[str, Any]:
    window = used_window(raw)
    return {"sliding_window": window, "attention_layers": "w"} if window else {}


def _rotary_problems(raw: Raw) -> list[str]:
    kind = kind_of(rope_of(raw)[1])
    # transformers takes yarn for longrope here.
    others = [f"{kind} rope scaling (phi3: none is supported)"] if kind != "default" else []
    return others or rope_problems(raw, partial=True)


def _rotary_section(raw: Raw) -> dict[str, Any]:
    share = partial_of(raw)
    return {**rope_section(raw), "rotary_fraction": 1.0 if share is None else float(share)}


def _rotary_config(model: ModelConfig) -> dict[str, Any]:
    return {**rope_config(model), "partial_rotary_factor": model.rotary_fraction}


def _cannot_write(model: ModelConfig) -> str | None:
    mixed = len(model.attention_kinds) > 1
    return "layers of several kinds of attention" if mixed else None


def _keys(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window}


FAMILIES = (
    llama_like(
        model_type="phi3",
        title="Phi-3, Phi-4",
        architecture="Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        keys=_keys,
        options=frozenset({WINDOW, "rotary_fraction"}),
        problems=only_full_layers,
        section=_section,
        cannot_write=_cannot_write,
        tensors=Phi3Tensors,
        scalings=frozenset(),
        rotary=(_rotary_problems, _rotary_section, _rotary_config),
    ),
)
