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
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}
"""Tensor, below its layer if it is in one -> what its rows (and columns) are."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor of the smaller model.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        source: name of the larger model's tensor.
        axes: along each axis the places that are kept; None means all.
        scale: factor on its numbers.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    axes: tuple[torch.Tensor | None, ...]
    scale: float = 1.0

    def read(self, files: WeightFiles) -> torch.Tensor:
        """Read the tensor, as it is stored."""
        values = files.read(self.source, (slice(None),) * len(self.axes))
        for axis, places in enumerate(self.axes):
            if places is not None:
                values = values.index_select(axis, places)
        if self.scale != 1.0:
            values = (values.double() * self.scale).to(values.dtype)
        assert tuple(values.shape) == self.shape, (self.name, values.shape)
        return values


def cuts(
    pruned: ModelConfig,
    kept: Kept,
    *,
    vocab_size: int,
    norm_shares: Mapping[str, torch.Tensor] | None,
) -> Iterator[Cut]:
    """Yield every tensor of the smaller model, in the order of its parameters.

    Args:
        pruned: its architecture.
        kept: what of the source it has.
        vocab_size: rows of the embedding.
        norm_shares: see `Scores`; None leaves the weights of the norms as they are.
    """
    width = pruned.kv_channels
    assert width is not None
    for name, shape in (
        correspondence(pruned, vocab_size=vocab_size, max_positions=0).shapes().items()
    ):
        layer, inner, source = _place(name, kept)
        places = {
            "all": None,
            "hidden": torch.tensor(kept.hidden),
            "heads": _channels(kept.heads[layer], width),
            "groups": _channels(kept.groups[layer], width),
            "ffn": torch.tensor(kept.ffn[layer]),
        }
        scale = 1.0
        if norm_shares is not None and source in norm_shares:
            scale = norm_scale(norm_shares[source], kept.hidden)
        axes = tuple(places[axis] for axis in _AXES[inner])
        yield Cut(name=name, shape=shape, source=source, axes=axes, scale=scale)


def norm_scale(shares: torch.Tensor, hidden: tuple[int, ...]) -> float:
    """Return the factor on an RMSNorm's weight that makes up for a mean square over fewer channels; 1 where none goes.

    It is the root mean square, over positions, of rms(kept channels) / rms(all channels): without it the norm's output
    shrinks by as much where the channels that stay are the large ones.

    Args:
        shares: float64[H] of `Scores.norm_shares`.
        hidden: channels kept.
    """
    if len(hidden) == len(shares):
        return 1.0
    return math.sqrt(float(shares[torch.tensor(hidden)].mean()))


def _place(name: str, kept: Kept) -> tuple[int, str, str]:
    """Return the position of a tensor's layer among those kept (0 outside), its name there, and the source's tensor."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return 0, name, name
    layer = int(parts[2])
    return layer, parts[3], f"model.layers.{kept.layers[layer]}.{parts[3]}"


def _channels(heads: tuple[int, ...], width: int) -> torch.Tensor:
    """Return int64[heads x width], the rows of these heads."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()
