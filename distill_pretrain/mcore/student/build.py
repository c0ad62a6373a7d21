"""Which student an optimizer section means."""

from __future__ import annotations

from distill_pretrain.mcore.model.config import OptimizerConfig
from distill_pretrain.mcore.student.base import Student


def student_class(optimizer: OptimizerConfig) -> type[Student]:
    """Return the class of `optimizer.backend`; DeepSpeed is imported where it is asked for, and nowhere else."""
    if optimizer.backend == "deepspeed":
        from distill_pretrain.mcore.student.deepspeed import DeepSpeedStudent

        return DeepSpeedStudent
    from distill_pretrain.mcore.student.megatron import MegatronStudent

    return MegatronStudent
