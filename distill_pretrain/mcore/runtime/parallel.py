"""Megatron-core's process groups and random-number streams for one layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.mcore.runtime import cpu_compat
from distill_pretrain.processes.groups import ParallelGroups


def current_groups() -> ParallelGroups:
    """Return the process groups of the layout in use; call it inside `model_parallel`."""
    from distill_pretrain.mcore.runtime.core import parallel_state as ps

    return ParallelGroups(
        tensor=ps.get_tensor_model_parallel_group(),
        pipeline=ps.get_pipeline_model_parallel_group(),
        data=ps.get_data_parallel_group(),
        context=ps.get_context_parallel_group(),
        data_context=ps.get_data_parallel_group(with_context_parallel=True),
        expert=ps.get_expert_model_parallel_group(),
        expert_data=ps.get_expert_data_parallel_group(),
        pipeline_last_rank=ps.get_pipeline_model_parallel_last_rank(),
    )


@contextmanager
def model_parallel(parallel: ParallelConfig, *, seed: int) -> Iterator[ParallelGroups]:
    """Make the process groups of this layout over the default one, and take them down at the end of the block.

    Args:
        parallel: layout; must divide the world size (`layout.data_parallel_size`).
        seed: of the dropout streams; pipeline stages get different ones, as in Megatron-LM, and so do context ranks.
    """
    cpu_compat.enable()
    from distill_pretrain.mcore.runtime import adam
    from distill_pretrain.mcore.runtime.core import (
        forget_rotary_embeddings,
        megatron_random,
        silence_chatter,
    )
    from distill_pretrain.mcore.runtime.core import parallel_state as ps

    silence_chatter()
    adam.install()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=True,
    )
    part = ps.get_pipeline_model_parallel_rank() + (
        parallel.pipeline * ps.get_context_parallel_rank()
    )
    megatron_random.model_parallel_cuda_manual_seed(seed + 100 * part)
    try:
        yield current_groups()
    finally:
        # Forgets the groups; no communication.
        ps.destroy_model_parallel()
        forget_rotary_embeddings()
