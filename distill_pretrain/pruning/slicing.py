"""The tensors of a smaller model, cut out of those of a larger one, one in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from distill_pretrain.checkpoint.hf.files import WeightFiles
from distill_pretrain.checkpoint.hf.registry import correspondence
from distill_pretrain.mcore.model.config import ModelConfig
from distill_pretrain.pruning.choice import Kept

_AXES: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("all", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("all", "hidden"),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("heads", "hidden"),
    "self_attn.k_proj.weight": ("groups", "hidden"),
    "self_attn.v_proj.weight": ("groups", "hidden"),
    "self_attn.q_proj.bias": ("heads",),
    "self_attn.k_proj.bias": ("groups",),
    "self_attn.v_proj.bias": ("groups",),
    "self_attn.o_proj.weight": ("hidden", "heads"),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": ("all",),
    "self_attn.k_norm.weight": ("all",),
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
    "self_attn.qkv_proj.weight": ("heads, groups, groups", "hidden"),
    "mlp.gate_up_proj.weight": ("ffn, ffn", "hidden"),
}
"""Tensor, below its layer if it is in one -> what its rows (and columns) are."""
_OF_WHOLE_NORMS = {"self_attn.q_norm.weight": ("heads",), "self_attn.k_norm.weight": ("groups",)}
"""The same of norms over all queries, or keys, at once."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor of the smaller model.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        source: name of the larger model's tensor.
        axes: along each axis the places that are kept; None means all.
        scale: factor on its numbers.
        offset: of a norm that multiplies by its weight and so much: the factor is on the sum.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    axes: tuple[torch.Tensor | None, ...]
    scale: float = 1.0
    offset: float = 0.0

    def read(self, files: WeightFiles) -> torch.Tensor:
        """Read the tensor, as it is stored."""
        values = files.read(self.source, (slice(None),) * len(self.axes))
        for axis, places in enumerate(self.axes):
            if places is not None:
                values = values.index_select(axis, places)
        if self.scale != 1.0:
            scaled = (values.double() + self.offset) * self.scale - self.offset
            values = scaled.to(values.dtype)
        assert tuple(values.shape) == self.shape, (self.name, values.shape)
        return values


def cuts(
    pruned: ModelConfig,
    kept: Kept,
    *,
    source: ModelConfig,
    vocab_size: int,
    norm_shares: Mapping[str, torch.Tensor] | None,
    family: str | None = None,
) -> Iterator[Cut]:
    """Yield every tensor of the smaller model, in the order of its parameters.

    Args:
        pruned: its architecture.
        kept: what of the source it has.
        source: architecture that it is cut out of.
        vocab_size: rows of the embedding.
        norm_shares: see `Scores`; None leaves the weights of the norms as they are.
        family: model_type that the smaller model keeps; None means that of the class which is written for its pieces.
    """
    width = pruned.kv_channels
    assert width is not None
    axes_of = {**_AXES, **(_OF_WHOLE_NORMS if pruned.qk_norm_whole else {})}
    factors = _embedding_factors(pruned, source)
    offset = 1.0 if pruned.zero_centred_norms else 0.0
    names = correspondence(pruned, vocab_size=vocab_size, max_positions=0, family=family)
    for name, shape in names.shapes().items():
        layer, inner, origin = _place(name, kept)
        heads, groups = (_channels(of[layer], width) for of in (kept.heads, kept.groups))
        ffn = torch.tensor(kept.ffn[layer])
        places = {
            "all": None,
            "hidden": torch.tensor(kept.hidden),
            "heads": heads,
            "groups": groups,
            "ffn": ffn,
            "heads, groups, groups": _joined(
                (heads, source.num_attention_heads * width),
                (groups, (source.num_query_groups or source.num_attention_heads) * width),
                (groups, 0),
            ),
            "ffn, ffn": _joined((ffn, source.ffn_hidden_size), (ffn, 0)),
        }
        scale = factors.get(name, 1.0)
        axes = tuple(places[axis] for axis in axes_of[inner])
        if norm_shares is not None and origin in norm_shares:
            assert axes[0] is not None
            scale *= norm_scale(norm_shares[origin], axes[0])
        is_norm = inner.endswith("norm.weight")
        yield Cut(
            name=name,
            shape=shape,
            source=origin,
            axes=axes,
            scale=scale,
            offset=offset if is_norm else 0.0,
        )


def _embedding_factors(pruned: ModelConfig, source: ModelConfig) -> dict[str, float]:
    """Factors that make up for another scale of the embedding, which is the root of the width: the function stays.

    Of a tied head the final norm takes the embedding's factor back.
    """
    if pruned.embedding_scale is None or source.embedding_scale is None:
        return {}
    factor = source.embedding_scale / pruned.embedding_scale
    embedding = {"model.embed_tokens.weight": factor}
    return {**embedding, "model.norm.weight": 1 / factor} if pruned.tie_embeddings else embedding


def norm_scale(shares: torch.Tensor, places: torch.Tensor) -> float:
    """Return the factor on an RMSNorm's weight that makes up for a mean square over fewer channels; 1 where none goes.

    It is the root mean square, over positions, of rms(kept channels) / rms(all channels): without it the norm's output
    shrinks by as much where the channels that stay are the large ones.

    Args:
        shares: float64[C] of `Scores.norm_shares`.
        places: int64, channels of the norm that are kept.
    """
    if len(places) == len(shares):
        return 1.0
    return math.sqrt(float(shares[places].mean()))


def _place(name: str, kept: Kept) -> tuple[int, str, str]:
    """Return the position of a tensor's layer among those kept (0 outside), its name there, and the source's tensor."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return 0, name, name
    layer = int(parts[2])
    return layer, parts[3], f"model.layers.{kept.layers[layer]}.{parts[3]}"


def _joined(*parts: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Return the places kept of projections in one tensor, one after another: of each its places, and all its rows."""
    found, start = [], 0
    for places, size in parts:
        found.append(places + start)
        start += size
    return torch.cat(found)


def _channels(heads: tuple[int, ...], width: int) -> torch.Tensor:
    """Return int64[heads x width], the rows of these heads."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()
