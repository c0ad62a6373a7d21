"""The section optimizer as megatron-core takes it."""

from __future__ import annotations

from distill_pretrain.mcore.model.chunks import DTYPES
from distill_pretrain.mcore.model.config import OptimizerConfig
from distill_pretrain.mcore.runtime.core import OptimizerConfig as MegatronOptimizerConfig


def megatron_optimizer_config(
    optimizer: OptimizerConfig, *, precision: str, distributed: bool
) -> MegatronOptimizerConfig:
    """Make megatron-core's configuration of an optimizer section."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=distributed,
    )
