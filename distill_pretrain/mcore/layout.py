"""Does a parallel layout fit the model, the batch and the number of processes? Every misfit at once."""

from __future__ import annotations

import importlib.util
import math

from distill_pretrain.errors import LayoutError, MissingDependency
from distill_pretrain.mcore.config import ModelConfig, OptimizerConfig, ParallelConfig


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int) -> int:
    """The least multiple of `divisor` and of the tensor-parallel size that holds the vocabulary."""
    multiple = math.lcm(divisor, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model; raises LayoutError where the processes do not divide."""
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise LayoutError(
            "the number of processes is not tensor x pipeline x data parallel",
            where="parallel.tensor, parallel.pipeline",
            found=f"{world_size} processes, tensor {parallel.tensor} x pipeline {parallel.pipeline}",
            expected=f"a multiple of {model_size} processes",
            remedy=f"start {model_size} (or a multiple) processes, or change the section `parallel`",
        )
    return world_size // model_size


def require_backend(optimizer: OptimizerConfig) -> None:
    """Raise MissingDependency where the package of `optimizer.backend` is not installed."""
    if optimizer.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependency(
            "deepspeed", extra="deepspeed", needed_for="optimizer.backend = deepspeed"
        )


def deepspeed_misfits(parallel: ParallelConfig) -> list[str]:
    """What of a layout DeepSpeed cannot train, each with the reason."""
    reasons = {
        "pipeline": "its engine runs no pipeline schedule of megatron-core",
        "virtual_pipeline": "its engine runs no pipeline schedule of megatron-core",
        "distributed_optimizer": "ZeRO shards the optimizer state already (optimizer.zero_stage)",
    }
    return [
        f"parallel.{name} = {getattr(parallel, name)} does not work with optimizer.backend = deepspeed: {reason}"
        for name, reason in reasons.items()
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    seq_len: int,
    optimizer: OptimizerConfig | None = None,
) -> int:
    """Raise one LayoutError that lists every misfit; return the data-parallel size.

    Args:
        model: architecture.
        parallel: layout.
        world_size: processes.
        micro_batch_size: sequences per forward pass.
        global_batch_size: sequences per optimizer step.
        seq_len: L.
        optimizer: of a model that is trained.
    """
    problems: list[str] = []
    if optimizer is not None and optimizer.backend == "deepspeed":
        problems += deepspeed_misfits(parallel)

    def must_divide(divisor: int, value: int, divisor_name: str, value_name: str) -> None:
        if value % divisor:
            problems.append(
                f"{value_name} = {value} is not divisible by {divisor_name} = {divisor}"
            )

    tp, pp, vpp = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    groups = model.num_query_groups or model.num_attention_heads
    must_divide(tp, model.num_attention_heads, "parallel.tensor", "model.num_attention_heads")
    must_divide(
        groups, model.num_attention_heads, "model.num_query_groups", "model.num_attention_heads"
    )
    must_divide(tp, groups, "parallel.tensor", "model.num_query_groups")
    must_divide(tp, model.ffn_hidden_size, "parallel.tensor", "model.ffn_hidden_size")
    if model.kv_channels is None:
        must_divide(
            model.num_attention_heads,
            model.hidden_size,
            "model.num_attention_heads",
            "model.hidden_size",
        )
    if parallel.sequence_parallel:
        must_divide(tp, seq_len, "parallel.tensor", "data.seq_len (sequence_parallel)")
    if vpp > 1 and pp == 1:
        problems.append("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
    must_divide(
        pp * vpp,
        model.num_layers,
        "parallel.pipeline x parallel.virtual_pipeline",
        "model.num_layers",
    )
    data_parallel = 0
    try:
        data_parallel = data_parallel_size(parallel, world_size)
    except LayoutError as error:
        problems.append(str(error))
    if data_parallel:
        per_step = micro_batch_size * data_parallel
        must_divide(
            per_step,
            global_batch_size,
            f"train.micro_batch_size x data-parallel size ({micro_batch_size} x {data_parallel})",
            "train.global_batch_size",
        )
        if vpp > 1 and global_batch_size % per_step == 0:
            must_divide(
                pp,
                global_batch_size // per_step,
                "parallel.pipeline (interleaved schedule)",
                "micro-batches per step",
            )
    if problems:
        raise LayoutError(
            "the parallel layout does not fit:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return data_parallel
