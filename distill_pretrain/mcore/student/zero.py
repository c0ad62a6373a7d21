"""DeepSpeed as a student uses it: the package, its configuration, its view of the groups, the optimizer it drives."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist

from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import OptimizerConfig
from distill_pretrain.mcore.model.layout import require_backend
from distill_pretrain.processes.groups import ParallelGroups

LARGEST_BUCKET = 500_000_000
KEPT_WHOLE = 100_000
"""ZeRO-3 keeps weights of at most so many elements on every rank."""


_CHATTER = (
    "Setting accelerator to CPU",
    # The subclass below.
    "You are using ZeRO with an untested optimizer",
)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CHATTER)


def import_deepspeed(optimizer: OptimizerConfig) -> ModuleType:
    """Import the package, without its chatter and without compiling anything.

    Raises:
        MissingDependency: it is not installed.
        ConfigError: it is, but cannot be imported.
    """
    require_backend(optimizer)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except Exception as error:
        raise ConfigError(
            "DeepSpeed is installed but cannot be imported",
            where="optimizer.backend",
            found=f"{type(error).__name__}: {error}",
            remedy="`distill-pretrain doctor` shows what is wrong with it",
        ) from error
    if not torch.cuda.is_available():
        # Its shared-memory collectives would be compiled at start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    package: ModuleType = deepspeed
    return package


def model_parallel_unit(groups: ParallelGroups) -> SimpleNamespace:
    """Return the process groups under the names DeepSpeed asks an `mpu` for."""

    def named(name: str, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
        return {
            f"get_{name}_group": lambda: group,
            f"get_{name}_rank": lambda: dist.get_rank(group),
            f"get_{name}_world_size": lambda: dist.get_world_size(group),
        }

    return SimpleNamespace(
        **named("model_parallel", groups.tensor),
        **named("tensor_model_parallel", groups.tensor),
        **named("pipeline_model_parallel", groups.pipeline),
        **named("data_parallel", groups.data),
        get_data_parallel_group_ranks=lambda: dist.get_process_group_ranks(groups.data),
        get_tensor_model_parallel_src_rank=lambda: dist.get_global_rank(groups.tensor, 0),
    )


def engine_config(
    optimizer: OptimizerConfig,
    *,
    precision: str,
    micro_batch_size: int,
    num_micro_batches: int,
    num_parameters: int,
) -> dict[str, object]:
    """Return what `deepspeed.initialize` takes as its configuration."""
    zero: dict[str, object] = {
        "stage": optimizer.zero_stage or 1,
        "reduce_bucket_size": min(LARGEST_BUCKET, num_parameters),
        "stage3_param_persistence_threshold": KEPT_WHOLE,
    }
    if optimizer.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": zero,
        # Torch's fused AdamW updates on the CPU as well as DeepSpeed's own, which would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


class ConditionalAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates; ZeRO calls it between the gradient norm and the new weights."""

    may_update: Callable[[], bool]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update this rank's partition once, if the update is accepted."""
        if self.may_update():
            super().step(closure)
