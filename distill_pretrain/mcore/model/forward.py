"""Forward passes without gradients over any tensor- and pipeline-parallel layout, up to the LM head.

Shapes: B sequences, L positions, H hidden size, V_own columns of this rank's LM head, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.contracts import Replica
from distill_pretrain.mcore.model.chunks import unwrap
from distill_pretrain.mcore.runtime.core import get_forward_backward_func, parallel_state


class ForwardOnly:
    """This rank's part of a model that only scores.

    Args:
        chunk: of `build_model_chunks`, its weights loaded; the process groups of its layout must exist.

    Attributes:
        head: [V_own, H], this rank's columns of the LM head; None on all but the last pipeline stage.
        logit_cap: of the model; what the head makes of hidden states is not capped.
    """

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._chunk = chunk.eval()
        self._gpt = unwrap(chunk)
        self.head: torch.Tensor | None = None
        self.logit_cap: float | None = self._gpt.logit_cap
        if self._gpt.post_process:
            tied = self._gpt.share_embeddings_and_output_weights
            weight = (
                self._gpt.shared_embedding_or_output_weight()
                if tied
                else self._gpt.output_layer.weight
            )
            self.head = weight.detach()

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Compute what the LM head is applied to, [B, L, H], for tokens int64[B, L]; None without an LM head.

        Every rank of the model calls it with the same tokens. With a pipeline the sequences pass in equal
        micro-batches, at most twice as many as stages, so that the stages work at once.
        """
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = _micro_batches(len(tokens), 2 * stages if stages > 1 else 1)
        size = len(tokens) // count
        with _without_head(self._gpt):
            outputs = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iter(tokens.split(size)),
                model=[self._chunk],
                num_microbatches=count,
                seq_length=tokens.size(1),
                micro_batch_size=size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return torch.cat(outputs, dim=1).transpose(0, 1) if self.head is not None else None


def scoring_replica() -> Replica:
    """Return the processes that hold this rank's copy of the model, in the layout in use."""
    ranks = sorted(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    has_head = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return Replica(
        group=parallel_state.get_model_parallel_group() if len(ranks) > 1 else None,
        vocab_group=(
            parallel_state.get_tensor_model_parallel_group() if tensor > 1 and has_head else None
        ),
        # Pipeline stages vary slowest with the rank.
        leader=ranks[-tensor],
        number=parallel_state.get_data_parallel_rank(),
        count=parallel_state.get_data_parallel_world_size(),
    )


def head_shard_rank() -> int:
    """Return this rank's place among those that split the LM head's columns."""
    return int(parallel_state.get_tensor_model_parallel_rank())


def _micro_batches(sequences: int, most: int) -> int:
    return max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)


def _forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
    tokens = next(batches)
    positions = torch.arange(tokens.size(1), device=tokens.device)
    hidden = model(tokens, positions.expand_as(tokens), None)
    return hidden, lambda output, non_loss_data: output


@contextmanager
def _without_head(gpt: Any) -> Iterator[None]:
    """The model gives its normalised hidden states, [L, B, H]; the decoder keeps its final norm."""
    had_head, gpt.post_process = gpt.post_process, False
    try:
        yield
    finally:
        gpt.post_process = had_head
