"""A checkpoint of this project with its gradients, for `gradients`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distill_pretrain.checkpoint.identity import trained_model
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.checkpoint.whole import load_whole_model, model_logits
from distill_pretrain.errors import TokenizerMismatch
from distill_pretrain.processes.process import local_device


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
        checkpoint = find_checkpoint(path)
        trained = trained_model(checkpoint.identity, checkpoint.folder)
        if trained.vocab_size != vocab_size:
            raise TokenizerMismatch(
                "the student's vocabulary is not the corpus's",
                where=f"eval.gradients.model, {path}",
                found=f"{trained.vocab_size} ids",
                expected=f"{vocab_size} ids",
                remedy="name a student that was trained on data.tokens",
            )
        self.sha256 = checkpoint.sha256
        self.vocab_size = vocab_size
        self.device = local_device()
        self._model = load_whole_model(checkpoint, precision="fp32")
        self.parameters: Sequence[torch.Tensor] = list(self._model.parameters())

    def logits_with_grad(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits float32[B, L, V], on the autograd tape, for tokens int64[B, L]."""
        return model_logits(self._model, tokens, self.vocab_size)
