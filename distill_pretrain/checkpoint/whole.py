"""A trained model of this project for scoring: whole in one process, or in parts."""

from __future__ import annotations

import torch

from distill_pretrain.checkpoint.identity import trained_model
from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.mcore.model.config import ParallelConfig


def load_whole_model(checkpoint: Checkpoint, *, precision: str) -> torch.nn.Module:
    """Load the model without dropout; (tokens, positions, None) -> logits [B, L, V_pad] in its own arithmetic.

    See `load_model_part`; each process is alone.
    """
    return load_model_part(checkpoint, ParallelConfig(), precision=precision)


def load_model_part(
    checkpoint: Checkpoint, parallel: ParallelConfig, *, precision: str
) -> torch.nn.Module:
    """Load this rank's part of the model without dropout, under any layout without virtual stages.

    Args:
        checkpoint: of a training run, under any layout; checked in full before it is read.
        parallel: layout; needs its process groups, of `mcore.parallel.model_parallel`.
        precision: "fp32" or "bf16".

    Raises:
        CheckpointError: it is damaged, or its residual scaling is not this version's.
    """
    from distill_pretrain.mcore.model.chunks import build_model_chunks
    from distill_pretrain.mcore.student.state import load_weights

    trained = trained_model(checkpoint.identity, checkpoint.folder)
    checkpoint.verify()
    chunks = build_model_chunks(
        trained.model,
        parallel,
        vocab_size=trained.vocab_size,
        seq_len=trained.seq_len,
        precision=precision,
        seed=None,
    )
    load_weights(chunks, checkpoint.folder)
    return chunks[0].eval()


def model_logits(model: torch.nn.Module, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Compute next-token logits, float32[B, L, V], for tokens int64[B, L]; differentiable where gradients are on."""
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    logits: torch.Tensor = model(tokens, positions, None)[..., :vocab_size].float()
    return logits
