"""What megatron-core has from 0.19 on: HybridModel and its parts; imported where it is asked for, and nowhere else."""

from __future__ import annotations

from distill_pretrain.mcore.runtime.importing import importing_megatron

with importing_megatron():
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

__all__ = ["HybridModel", "HybridStack", "HybridStackSubmodules"]
