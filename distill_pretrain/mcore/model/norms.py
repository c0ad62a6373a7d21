"""Norms of the local spec, which allow sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch

from distill_pretrain.mcore.runtime.core import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm; megatron-core's own torch wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums this gradient over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + its weight, in fp32."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]."""
        assert self.eps is not None
        rows = x.float()
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        return (rows * (1.0 + self.weight.float())).to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm under the same contract as `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
