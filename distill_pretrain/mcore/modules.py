"""Layer modules that megatron-core's local spec lacks: norms that allow sequence parallelism, and SDPA attention.

Shapes: s positions, b sequences, n heads, g query groups, h head width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.mcore.core import (
    MegatronModule,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    tensor_parallel,
)
from distill_pretrain.mcore.deep import ResidualScaling
from distill_pretrain.mcore.deep_layers import DeepLayer, PostNormLayer


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm; megatron-core's own torch wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums this gradient over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm under the same contract as `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(MegatronModule):
    """Causal core attention on `torch.nn.functional.scaled_dot_product_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Query [s, b, n, h], key and value [s, b, g, h] -> [s, b, n * h]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        s, b, n, h = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        groups = k.size(1)
        if groups != n and q.dtype == torch.float32:
            # On GPUs grouped heads in fp32 have no fused kernel and would make [s, s] matrices.
            k, v = (x.repeat_interleave(n // groups, dim=1) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        # Heads on different tensor-parallel ranks need masks of their own, as in megatron-core's attention.
        own_stream = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_stream else nullcontext():
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * h)


def block_submodules(
    config: TransformerConfig, vp_stage: int | None, scaling: ResidualScaling
) -> TransformerBlockSubmodules:
    """The layers this pipeline stage builds, and the final norm of a Pre-LN model, from the modules above."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    layer = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=False)
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = norm
        layer.submodules.self_attention.submodules.k_layernorm = norm
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = SDPAttention
    post = scaling.placement == "post"
    if post or not scaling.is_plain:
        layer.module = PostNormLayer if post else DeepLayer
        layer.params = {"scaling": scaling}
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=None if post else norm
    )
