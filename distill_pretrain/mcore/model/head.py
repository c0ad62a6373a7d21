"""An LM head that gives the loss in place of logits.

Shapes: B sequences, L positions, H hidden size, V/tp columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distill_pretrain.mcore.runtime.core import tensor_parallel

FromHidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states [L, B, H], this rank's weight [V/tp, H]) -> loss terms; its gradient by the hidden states is this
rank's part of a sum over the tensor-parallel ranks."""


@contextmanager
def head_computes(output_layer: Any, from_hidden: FromHidden) -> Iterator[None]:
    """Within, the output layer (a ColumnParallelLinear) returns `from_hidden` of its whole input.

    The layer itself is still called, since ZeRO-3 and DDP gather its weight in hooks around the call.
    """

    def computed(
        *,
        input: torch.Tensor,
        weight: torch.Tensor,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> torch.Tensor:
        hidden = input
        if sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        return from_hidden(hidden, weight)

    output_layer._forward_impl = computed
    try:
        yield
    finally:
        del output_layer._forward_impl
