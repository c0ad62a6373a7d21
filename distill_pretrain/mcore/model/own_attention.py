"""Attention that megatron-core's has no setting for: YaRN, layers without rotary embedding, norms over all heads.

Shapes: s positions of this rank, b sequences, n heads of this rank, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from distill_pretrain.mcore.model.config import ModelConfig, YarnConfig
from distill_pretrain.mcore.runtime.core import (
    RotaryEmbedding,
    SelfAttention,
    TransformerConfig,
    apply_rotary_pos_emb,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)

_SINK_CHANNELS = 8
"""Channels that a head has more for its sink: kernels want multiples of 8."""


def yarn_frequencies(yarn: YarnConfig, base: float, width: int) -> torch.Tensor:
    """Compute float32[width / 2], the angle that each pair of channels turns by at every position.

    Pairs that turn often keep their angle, those that turn seldom turn slower by `factor`, and a ramp leads from ones
    to others. Operations are in transformers' order: at far positions angles are large, and so are their errors.
    """

    def pair_of(turns: float) -> float:
        far = yarn.original_positions / (turns * 2 * math.pi)
        return width * math.log(far) / (2 * math.log(base))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    periods = base ** (torch.arange(0, width, 2).to(torch.float) / width)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - torch.clamp(ramp, 0, 1)
    return 1.0 / (yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept


class Rotary:
    """Rotary embedding of one kind of layer, as megatron-core makes and applies it.

    Args:
        model: architecture.
        config: of megatron-core.
        base: of the rotary embedding.
        scaled: whether the model's scaling is in use here.
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, *, base: float, scaled: bool
    ) -> None:
        width = model.kv_channels or model.hidden_size // model.num_attention_heads
        self._embedding = RotaryEmbedding(
            kv_channels=width,
            rotary_percent=model.rotary_fraction,
            rotary_base=base,
            rope_scaling=scaled and model.rope_scaling_factor is not None,
            rope_scaling_factor=model.rope_scaling_factor or 1.0,
            use_cpu_initialization=True,
        )
        self._scale = 1.0
        if scaled and model.rope_linear_factor is not None:
            self._embedding.inv_freq = self._embedding.inv_freq / model.rope_linear_factor
        if scaled and model.yarn is not None:
            turned = int(width * model.rotary_fraction)
            self._embedding.inv_freq = yarn_frequencies(model.yarn, base, turned)
            self._scale = model.yarn.scale
        self._config = config

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys [s, b, n, d] of this rank's positions."""
        whole = len(x) * self._config.context_parallel_size
        result: torch.Tensor = apply_rotary_pos_emb(
            x, self._embedding(whole), config=self._config, mscale=self._scale
        )
        return result


class WholeRMSNorm(torch.nn.Module):
    """RMSNorm over the queries, or the keys, of all heads, which tensor-parallel ranks share out.

    Args:
        width: channels of this rank.
        total: of all ranks.
        epsilon: of the norm.
        dtype: of the weight.
    """

    def __init__(self, width: int, total: int, *, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self._total, self._epsilon = total, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [s, b, n, d]."""
        rows = x.flatten(2).float()
        squares = rows.square().sum(-1, keepdim=True)
        if self._total != rows.size(-1):
            squares = _SumOverTensorRanks.apply(squares)
        rows = rows * torch.rsqrt(squares / self._total + self._epsilon)
        return (self.weight * rows).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the weight as one of which every tensor-parallel rank has a part."""
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return result


class _SumOverTensorRanks(torch.autograd.Function):
    """A sum that every rank goes on with in its own way: gradients add up, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total


class OwnAttention(SelfAttention):
    """Attention whose queries and keys are normed and rotated here; parameters are megatron-core's, but for norms.

    Args:
        model: architecture.
        rotaries: kind of attention of a layer -> rotary embedding; None where it has none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        model: ModelConfig,
        rotaries: dict[str, Rotary | None],
        **settings: Any,
    ) -> None:
        super().__init__(config, *args, **settings)
        # In a tuple: torch would take a module for a part of this one.
        self._rotary = (rotaries[model.attention_of(self.layer_number - 1)],)
        self.query_norm = self.key_norm = None
        if model.qk_norm_whole:
            width = self.hidden_size_per_attention_head
            ranks = config.tensor_model_parallel_size
            heads = (config.num_attention_heads, config.num_query_groups)
            self.query_norm, self.key_norm = (
                WholeRMSNorm(
                    number * width // ranks,
                    number * width,
                    epsilon=config.layernorm_epsilon,
                    dtype=config.params_dtype,
                )
                for number in heads
            )

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **settings: Any) -> Any:
        """Attend; the model's rotary embedding, the same for all layers, is not used."""
        return super().forward(*args, rotary_pos_emb=None, **settings)

    def get_query_key_value_tensors(self, *args: Any, **settings: Any) -> Any:
        """Compute queries [s, b, n, d], keys and values, normed and rotated."""
        query, key, value = super().get_query_key_value_tensors(*args, **settings)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        (rotary,) = self._rotary
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        return query, key, value


def rotaries_of(model: ModelConfig, config: TransformerConfig) -> dict[str, Rotary | None]:
    """Make the rotary embedding of every kind of attention, one for all layers of the kind."""
    everywhere = windowed = Rotary(model, config, base=model.rotary_base, scaled=True)
    own_base = model.windowed_rotary_base
    if own_base is not None or (model.yarn is not None and model.yarn.full_layers_only):
        windowed = Rotary(model, config, base=own_base or model.rotary_base, scaled=False)
    return {"f": everywhere, "w": windowed, "n": None}


class Sinks(torch.nn.Module):
    """A learned logit for each head of this rank, of a key that every query sees and whose value is 0."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add that key in front, so that any kernel of attention computes it.

        One more channel does it: the logit in queries, 1 in that key and 0 in all others. There are as many more as
        kernels ask for.

        Args:
            q: [b, n, s, h].
            k: [b, g, S, h].
            v: [b, g, S, h].
            scale: of products, before the softmax.

        Returns:
            q [b, n, s, h + 8], k and v [b, g, S + 1, h + 8].
        """
        own = (self.weight / scale).to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        q = torch.cat((q, own, q.new_zeros(*q.shape[:3], _SINK_CHANNELS - 1)), dim=3)
        first = k.new_zeros(*k.shape[:2], 1, k.size(3) + _SINK_CHANNELS)
        first[..., k.size(3)] = 1
        k = torch.cat((first, F.pad(k, (0, _SINK_CHANNELS))), dim=2)
        return q, k, F.pad(v, (0, _SINK_CHANNELS, 1, 0))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the logits, which tensor-parallel ranks share out as they do the heads."""
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return result


def with_bias(linear: type) -> type:
    """Make a class of a parallel linear layer that has a bias whatever the configuration of the model says."""

    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **settings: Any) -> None:
            super().__init__(*args, bias=True, **settings)

    return Biased
