"""Which Hugging Face tensors make up which megatron-core parameter, whole and under tensor parallelism.

Shapes: V vocabulary, H hidden_size, F ffn_hidden_size, n query heads, g key/value heads, r = n / g, d head width.

megatron-core's linear_qkv interleaves: g groups of r query heads, one key and one value head. Its gated linear_fc1
is gate over up, and each tensor-parallel rank holds its share of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from distill_pretrain.mcore.init.deep import residual_scaling
from distill_pretrain.mcore.model.config import ModelConfig

Select = Callable[[torch.Tensor], torch.Tensor]


def _all_of(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a Hugging Face tensor that a parameter holds.

    Attributes:
        tensor: name of the Hugging Face tensor.
        shape: its shape.
        select: view of the part of the (local) parameter; flattened it is the part of the tensor, flattened.
        split: dimension of the tensor that tensor-parallel ranks share out; None where each holds all of it.
        start: first row (column) along `split` of what the ranks share out.
        length: rows (columns) along `split` that they share out; None means all from `start` on.
        transposed: the parameter holds the transpose of the tensor.
        padded: the ranks' parts may reach beyond `length`; the rest is padding.
        at: element along the tensor's first dimension that the parameter holds; None for all.
        scale: the tensor is so many times the parameter: the coefficient of a branch, which no stock class has.
    """

    tensor: str
    shape: tuple[int, ...]
    select: Select = _all_of
    split: int | None = None
    start: int = 0
    length: int | None = None
    transposed: bool = False
    padded: bool = False
    at: int | None = None
    scale: float = 1.0

    def fits(self, numel: int, size: int) -> bool:
        """Say whether `size` ranks with so many elements each hold the whole."""
        if self.split is None:
            return numel == math.prod(self.local_shape(numel))
        step, rest = divmod(numel, self._row_numel)
        length = self._length
        return not rest and (step * size >= length if self.padded else step * size == length)

    def index(self, numel: int, rank: int) -> tuple[slice, ...]:
        """Return what of the tensor a rank with so many elements holds; short, or empty, where the rest is padding."""
        if self.split is None:
            first = 0 if self.at is None else self.at
            sizes = self.local_shape(numel)
            return (slice(first, first + sizes[0]), *(slice(0, n) for n in sizes[1:]))
        step = numel // self._row_numel
        low, high = (self.start + min(edge * step, self._length) for edge in (rank, rank + 1))
        bounds = [slice(0, n) for n in self.shape]
        bounds[self.split] = slice(low, high)
        return tuple(bounds)

    def local_shape(self, numel: int) -> tuple[int, ...]:
        """Return the shape of a rank's part of the tensor, padding included."""
        shape = list(self.shape)
        if self.at is not None:
            shape[0] = 1
        if self.split is not None:
            shape[self.split] = numel // self._row_numel
        return tuple(shape)

    @property
    def _length(self) -> int:
        assert self.split is not None
        return self.shape[self.split] - self.start if self.length is None else self.length

    @property
    def _row_numel(self) -> int:
        assert self.split is not None
        return math.prod(self.shape) // self.shape[self.split]


class Correspondence:
    """The parameters of a whole model and their tensors: the key map of a family.

    Args:
        model: architecture.
        vocab_size: V, rows of the stored embedding.
        max_positions: learned positions of a gpt2 model.

    Attributes:
        tied_tensors: head and embedding, one and the same in a tied model.
    """

    tied_tensors: tuple[str, str]

    def __init__(self, model: ModelConfig, *, vocab_size: int, max_positions: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.heads = model.num_attention_heads
        self.groups = model.num_query_groups or self.heads
        self.head_dim = model.kv_channels or model.hidden_size // self.heads
        self.scaling = residual_scaling(model)

    def outside_layers(self) -> tuple[dict[str, list[Piece]], dict[str, list[Piece]]]:
        """Return parameter name -> pieces, of what comes before the layers and what comes after them."""
        raise NotImplementedError

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return parameter name below `decoder.layers.N.` -> pieces."""
        raise NotImplementedError

    def pieces(self) -> dict[str, list[Piece]]:
        """Return every parameter of the whole model, in order, and its pieces."""
        before, after = self.outside_layers()
        layers = {
            f"decoder.layers.{number}.{name}": self._scaled(number, name, pieces)
            for number in range(self.model.num_layers)
            for name, pieces in self.in_layer(number).items()
        }
        return {**before, **layers, **after}

    def _scaled(self, number: int, name: str, pieces: list[Piece]) -> list[Piece]:
        """Put the coefficient of a branch into the pieces that write the branch to the residual stream."""
        for branch, linear in enumerate(("self_attention.linear_proj.", "mlp.linear_fc2.")):
            if name.startswith(linear):
                scale = self.scaling.coefficient(2 * number + branch)
                return [replace(piece, scale=scale) for piece in pieces]
        return pieces

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every Hugging Face tensor, by name."""
        return {p.tensor: p.shape for pieces in self.pieces().values() for p in pieces}

    def vocabulary(self, tensor: str) -> list[Piece]:
        """Return the piece of the rows of an embedding or head [V, H], which are padded."""
        shape = (self.vocab_size, self.model.hidden_size)
        return [Piece(tensor=tensor, shape=shape, split=0, padded=True)]

    def head_of_kind(self, kind: str) -> Select:
        """View of the query, key or value rows of linear_qkv, weight or bias: [g, r or 1, d, ...]."""
        ratio = self.heads // self.groups
        heads = {
            "q": slice(0, ratio),
            "k": slice(ratio, ratio + 1),
            "v": slice(ratio + 1, ratio + 2),
        }[kind]

        def select(parameter: torch.Tensor) -> torch.Tensor:
            grouped = parameter.view(-1, ratio + 2, self.head_dim, *parameter.shape[1:])
            return grouped[:, heads]

        return select


def whole(tensor: str, *shape: int) -> list[Piece]:
    """Return the one piece of a parameter that every rank holds whole."""
    return [Piece(tensor=tensor, shape=shape)]


class LlamaTensors(Correspondence):
    """Llama, Mistral, Qwen2 and Qwen3: q, k, v, gate and up are tensors of their own."""

    tied_tensors = ("lm_head.weight", "model.embed_tokens.weight")

    def outside_layers(self) -> tuple[dict[str, list[Piece]], dict[str, list[Piece]]]:
        """Return the pieces of the embedding, of the final norm and of the head."""
        before = {"embedding.word_embeddings.weight": self.vocabulary("model.embed_tokens.weight")}
        after = {
            "decoder.final_layernorm.weight": whole("model.norm.weight", self.model.hidden_size)
        }
        if not self.model.tie_embeddings:
            after["output_layer.weight"] = self.vocabulary("lm_head.weight")
        return before, after

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer's norms, attention and feed-forward block."""
        model, here = self.model, f"model.layers.{number}."
        hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, self.heads * self.head_dim
        pieces = {
            "input_layernorm.weight": whole(here + "input_layernorm.weight", hidden),
            "self_attention.linear_qkv.weight": self._qkv(here, "weight", hidden),
        }
        if model.qkv_bias:
            pieces["self_attention.linear_qkv.bias"] = self._qkv(here, "bias")
        if model.qk_norm:
            for kind in "qk":
                pieces[f"self_attention.{kind}_layernorm.weight"] = whole(
                    f"{here}self_attn.{kind}_norm.weight", self.head_dim
                )
        return {
            **pieces,
            "self_attention.linear_proj.weight": [
                Piece(tensor=here + "self_attn.o_proj.weight", shape=(hidden, width), split=1)
            ],
            **self._biases(here),
            "pre_mlp_layernorm.weight": whole(here + "post_attention_layernorm.weight", hidden),
            "mlp.linear_fc1.weight": [
                Piece(
                    tensor=f"{here}mlp.{name}.weight", shape=(ffn, hidden), select=half(i), split=0
                )
                for i, name in enumerate(("gate_proj", "up_proj"))
            ],
            "mlp.linear_fc2.weight": [
                Piece(tensor=here + "mlp.down_proj.weight", shape=(hidden, ffn), split=1)
            ],
        }

    def _biases(self, here: str) -> dict[str, list[Piece]]:
        hidden, ffn = self.model.hidden_size, self.model.ffn_hidden_size
        pieces: dict[str, list[Piece]] = {}
        if self.model.attention_output_bias:
            pieces["self_attention.linear_proj.bias"] = whole(
                f"{here}self_attn.o_proj.bias", hidden
            )
        if self.model.mlp_bias:
            pieces["mlp.linear_fc1.bias"] = [
                Piece(tensor=f"{here}mlp.{name}.bias", shape=(ffn,), select=half(i), split=0)
                for i, name in enumerate(("gate_proj", "up_proj"))
            ]
            pieces["mlp.linear_fc2.bias"] = whole(f"{here}mlp.down_proj.bias", hidden)
        return pieces

    def _qkv(self, here: str, kind: str, *columns: int) -> list[Piece]:
        rows = {"q": self.heads, "k": self.groups, "v": self.groups}
        return [
            Piece(
                tensor=f"{here}self_attn.{name}_proj.{kind}",
                shape=(heads * self.head_dim, *columns),
                select=self.head_of_kind(name),
                split=0,
            )
            for name, heads in rows.items()
        ]


class ExpertTensors(LlamaTensors):
    """Llama's, with a router and experts in the place of the feed-forward block."""

    def in_layer(self, number: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer."""
        assert self.model.experts is not None
        hidden, experts = self.model.hidden_size, self.model.experts.number
        here = f"model.layers.{number}.mlp."
        pieces = {k: p for k, p in super().in_layer(number).items() if not k.startswith("mlp.")}
        pieces["mlp.router.weight"] = whole(f"{here}gate.weight", experts, hidden)
        for expert in range(experts):
            pieces |= self.of_expert(here, expert)
        return pieces

    def of_expert(self, here: str, expert: int) -> dict[str, list[Piece]]:
        """Return the pieces of an expert, which one rank holds whole."""
        hidden, width = self.model.hidden_size, self.model.ffn_hidden_size
        own, tensors = f"mlp.experts.local_experts.{expert}.", f"{here}experts.{expert}."
        return {
            f"{own}linear_fc1.weight": [
                Piece(tensor=f"{tensors}{name}.weight", shape=(width, hidden), select=half(i))
                for i, name in enumerate(("gate_proj", "up_proj"))
            ],
            f"{own}linear_fc2.weight": whole(f"{tensors}down_proj.weight", hidden, width),
        }


def half(number: int) -> Select:
    """View of the gate's (0) or up's (1) rows of linear_fc1."""
    return lambda parameter: parameter.chunk(2)[number]
