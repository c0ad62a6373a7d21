"""Transformer layers whose branches join the residual stream as `deep.ResidualScaling` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.mcore.init.deep import ResidualScaling
from distill_pretrain.mcore.runtime.core import TransformerConfig, TransformerLayer

BiasDropoutAdd = Callable[..., Callable[[Any, torch.Tensor, float], torch.Tensor]]
"""What megatron-core's layers call: (training, fused) -> ((x, bias), residual, dropout) -> sum."""


def scaled_bias_dropout_add(coefficient: float) -> BiasDropoutAdd:
    """Compute residual + coefficient * dropout(x + bias), rounded once to the residual's type."""

    def with_mode(
        training: bool, fused: bool
    ) -> Callable[[Any, torch.Tensor, float], torch.Tensor]:
        def add(branch: Any, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            x, bias = branch
            x = x if bias is None else x + bias
            x = F.dropout(x, p=dropout, training=training)
            return torch.add(residual, x.to(residual.dtype), alpha=coefficient)

        return add

    return with_mode


class DeepLayer(TransformerLayer):
    """A Pre-LN layer with scaled branches; same parameters as megatron-core's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        *args: Any,
        scaling: ResidualScaling,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        # That path of megatron-core adds the residual inside the projections and never asks for these.
        assert not config.inference_fuse_tp_communication
        sublayer = 2 * (self.layer_number - 1)
        self.self_attn_bda = scaled_bias_dropout_add(scaling.coefficient(sublayer))
        self.mlp_bda = scaled_bias_dropout_add(scaling.coefficient(sublayer + 1))


class PostNormLayer(DeepLayer):
    """A Post-LN layer (experimental): each norm follows the sum.

    `submodules` carry the norm as `input_layernorm` and `pre_mlp_layernorm`; megatron-core would apply them at the
    branches' inputs, so they are built there and moved.
    """

    input_layernorm: torch.nn.Module
    pre_mlp_layernorm: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_attention_layernorm = self.input_layernorm
        self.post_mlp_layernorm = self.pre_mlp_layernorm
        self.input_layernorm = torch.nn.Identity()
        self.pre_mlp_layernorm = torch.nn.Identity()
        self.self_attn_bda = _then(self.self_attn_bda, self.post_attention_layernorm)
        self.mlp_bda = _then(self.mlp_bda, self.post_mlp_layernorm)


def _then(bda: BiasDropoutAdd, norm: torch.nn.Module) -> BiasDropoutAdd:
    def with_mode(
        training: bool, fused: bool
    ) -> Callable[[Any, torch.Tensor, float], torch.Tensor]:
        add = bda(training, fused)
        return lambda branch, residual, dropout: norm(add(branch, residual, dropout))

    return with_mode


class ReorderedLayer(DeepLayer):
    """A layer whose norms follow the branches, before the sum: x + norm(F(x)), as in Olmo 2.

    `submodules` carry the norms as those of `PostNormLayer` do.
    """

    input_layernorm: torch.nn.Module
    pre_mlp_layernorm: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_attention_layernorm = self.input_layernorm
        self.post_mlp_layernorm = self.pre_mlp_layernorm
        self.input_layernorm = torch.nn.Identity()
        self.pre_mlp_layernorm = torch.nn.Identity()
        self.self_attn_bda = _of_normed(self.self_attn_bda, self.post_attention_layernorm)
        self.mlp_bda = _of_normed(self.mlp_bda, self.post_mlp_layernorm)


class SandwichLayer(DeepLayer):
    """A Pre-LN layer whose branches are normed once more before the sum, as in Gemma 3."""

    input_layernorm: torch.nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_attention_layernorm, self.post_mlp_layernorm = (
            type(self.input_layernorm)(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )
            for _ in range(2)
        )
        self.self_attn_bda = _of_normed(self.self_attn_bda, self.post_attention_layernorm)
        self.mlp_bda = _of_normed(self.mlp_bda, self.post_mlp_layernorm)


def _of_normed(bda: BiasDropoutAdd, norm: torch.nn.Module) -> BiasDropoutAdd:
    def with_mode(
        training: bool, fused: bool
    ) -> Callable[[Any, torch.Tensor, float], torch.Tensor]:
        add = bda(training, fused)

        def of_normed(branch: Any, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            x, bias = branch
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return of_normed

    return with_mode
