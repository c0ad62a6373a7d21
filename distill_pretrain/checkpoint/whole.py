"""A trained model of this project, whole in one process."""

from __future__ import annotations

import torch

from distill_pretrain.checkpoint.store import Checkpoint
from distill_pretrain.mcore.config import ModelConfig, ParallelConfig


def load_whole_model(checkpoint: Checkpoint, *, precision: str) -> torch.nn.Module:
    """The model without dropout; (tokens, positions, None) -> logits [B, L, V_pad] in its own arithmetic.

    Args:
        checkpoint: of a training run; checked in full before it is read.
        precision: "fp32" or "bf16".

    Raises:
        CheckpointError: it is damaged.

    Needs the process groups of `mcore.parallel.model_parallel`, each of one process.
    """
    from distill_pretrain.mcore.model import build_model_chunks
    from distill_pretrain.mcore.state import load_weights

    trained = checkpoint.identity
    checkpoint.verify()
    chunks = build_model_chunks(
        ModelConfig(**trained["model"]),
        ParallelConfig(),
        vocab_size=trained["vocab_size"],
        seq_len=trained["seq_len"],
        precision=precision,
        seed=None,
    )
    load_weights(chunks, checkpoint.folder)
    return chunks[0].eval()


def model_logits(model: torch.nn.Module, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Next-token logits, float32[B, L, V], for tokens int64[B, L]; differentiable where gradients are on."""
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    logits: torch.Tensor = model(tokens, positions, None)[..., :vocab_size].float()
    return logits
