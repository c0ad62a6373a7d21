"""A model whose loss is handed in, and an LM head that gives the loss in place of logits.

Shapes: B sequences, L positions, H hidden size, V/tp columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.kernels.sparse_kd.cap import soft_capped
from distill_pretrain.mcore.runtime.core import tensor_parallel

LossFunction = Callable[[torch.Tensor, TokenBatch], torch.Tensor]
"""(vocab-parallel logits [L, B, V/tp], batch [B, L]) -> summed terms, float32[num_terms].

The first term is minimised; the others are reported. One with a true `takes_hidden` has `from_hidden(hidden [L, B, H],
weight [V/tp, H], *, batch)` called in its place, and no logits are made."""

FromHidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states [L, B, H], this rank's weight [V/tp, H]) -> loss terms; its gradient by the hidden states is this
rank's part of a sum over the tensor-parallel ranks."""


@contextmanager
def head_computes(output_layer: Any, from_hidden: FromHidden) -> Iterator[None]:
    """Let the output layer (a ColumnParallelLinear), inside the block, return `from_hidden` of its whole input.

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


class LossGivenIn:
    """Mixed into GPTModel or HybridModel: sparse targets reach the last pipeline stage as `labels`."""

    loss_function: LossFunction | None = None
    logit_cap: float | None = None
    """The logits are this * tanh(z / this) of the LM head's z, which is what a loss function is given."""
    post_process: bool
    output_layer: Any

    def forward(self, *inputs: Any, labels: TokenBatch | None = None, **settings: Any) -> Any:
        """Do what megatron-core does here, but give hidden states in place of logits to a loss that takes them.

        Logits that are returned are capped.
        """
        head: Any = nullcontext()
        if self.post_process and labels is not None and self._takes_hidden:
            loss: Any = self.loss_function
            head = head_computes(self.output_layer, partial(loss.from_hidden, batch=labels))
        with head:
            output = super().forward(*inputs, labels=labels, **settings)  # type: ignore[misc]
        if self.logit_cap and self.post_process and labels is None:
            return soft_capped(output, self.logit_cap).to(output.dtype)
        return output

    def compute_language_model_loss(self, labels: TokenBatch, logits: torch.Tensor) -> torch.Tensor:
        """Compute the loss terms of a micro-batch from logits [L, B, V/tp], unless the head has made them."""
        if self._takes_hidden:
            return logits
        assert self.loss_function is not None
        return self.loss_function(logits, labels)

    @property
    def _takes_hidden(self) -> bool:
        return bool(getattr(self.loss_function, "takes_hidden", False))
