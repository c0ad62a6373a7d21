"""A checkpoint of this project with its gradients, for `gradients`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.dist.process import local_device
from distill_pretrain.errors import TokenizerMismatch
from distill_pretrain.mcore.config import ModelConfig, ParallelConfig


class CheckpointStudent:
    """A whole model in fp32, without dropout; see `gradients.DifferentiableModel`.

    Args:
        path: run or checkpoint folder.
        vocab_size: V of the corpus.

    Raises:
        CheckpointError: there is none, or it is damaged.
        TokenizerMismatch: its vocabulary is not the corpus's.

    Needs the process groups of `mcore.parallel.model_parallel`.
    """

    def __init__(self, path: Path, *, vocab_size: int) -> None:
        from distill_pretrain.mcore.model import build_model_chunks
        from distill_pretrain.mcore.state import load_weights

        checkpoint = find_checkpoint(path)
        trained = checkpoint.identity
        if trained["vocab_size"] != vocab_size:
            raise TokenizerMismatch(
                "the student's vocabulary is not the corpus's",
                where=f"eval.gradients.model, {path}",
                found=f"{trained['vocab_size']} ids",
                expected=f"{vocab_size} ids",
                remedy="name a student that was trained on data.tokens",
            )
        checkpoint.verify()
        chunks = build_model_chunks(
            ModelConfig(**trained["model"]),
            ParallelConfig(),
            vocab_size=vocab_size,
            seq_len=trained["seq_len"],
            precision="fp32",
            seed=None,
        )
        load_weights(chunks, checkpoint.folder)
        self.sha256 = checkpoint.sha256
        self.vocab_size = vocab_size
        self.device = local_device()
        self._model = chunks[0].eval()
        self.parameters: Sequence[torch.Tensor] = list(self._model.parameters())

    def logits_with_grad(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32[B, L, V] for tokens int64[B, L]."""
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        return self._model(tokens, positions, None)[..., : self.vocab_size].float()
