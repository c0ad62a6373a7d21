"""The process groups of a parallel layout, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Process groups of this rank.

    Attributes:
        tensor: ranks that hold slices of the same layers.
        pipeline: ranks that hold the other layers of the same model.
        data: ranks that hold the same slices and see other sequences.
        context: ranks that hold the same slices and see other parts of the same sequences.
        data_context: both of these; gradients and losses are summed over them.
        expert: ranks that share out the experts of the same layers.
        expert_data: ranks that hold the same experts; their gradients are summed over them.
        pipeline_last_rank: global rank of this pipeline's last stage.
    """

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    context: dist.ProcessGroup
    data_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    pipeline_last_rank: int
