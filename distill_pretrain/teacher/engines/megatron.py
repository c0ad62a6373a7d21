"""Scores with a checkpoint that this project trained; one whole model per process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.checkpoint.whole import load_whole_model, model_logits
from distill_pretrain.dist.process import local_device
from distill_pretrain.errors import TeacherError, TokenizerMismatch


class MegatronEngine:
    """See `open_engine`; the architecture comes from the checkpoint itself."""

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        vocab_size: int,
        seq_len: int,
        tokenizer_sha256: str | None,
    ) -> None:
        checkpoint = find_checkpoint(path)
        trained = checkpoint.identity
        _require_same_tokens(path, trained, vocab_size, tokenizer_sha256)
        if trained["model"]["arch"] == "gpt2" and seq_len > trained["seq_len"]:
            raise TeacherError(
                "the sequences are longer than the model's learned positions",
                where=path,
                found=seq_len,
                expected=f"at most {trained['seq_len']}",
            )
        self.vocab_size = vocab_size
        self.device = local_device()
        self._identity = {
            "kind": "megatron",
            "dtype": dtype,
            "step": checkpoint.step,
            "checkpoint_sha256": checkpoint.sha256,
        }
        self._model = load_whole_model(checkpoint, precision=dtype)

    @property
    def identity(self) -> dict[str, Any]:
        """Engine, arithmetic and weights."""
        return self._identity

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32[B, L, V] for tokens int64[B, L]."""
        return model_logits(self._model, tokens, self.vocab_size)


def _require_same_tokens(
    path: Path, trained: dict[str, Any], vocab_size: int, tokenizer_sha256: str | None
) -> None:
    if trained["vocab_size"] != vocab_size:
        raise TokenizerMismatch(
            "the model's vocabulary is not the corpus's",
            where=path,
            found=f"{trained['vocab_size']} ids",
            expected=f"{vocab_size} ids",
            remedy="tokenise the corpus with the model's tokenizer",
        )
    known = trained.get("tokenizer_sha256")
    if known and tokenizer_sha256 and known != tokenizer_sha256:
        raise TokenizerMismatch(
            "the model was trained with another tokenizer",
            where=path,
            found=f"tokenizer {known[:12]}",
            expected=f"tokenizer {tokenizer_sha256[:12]}",
            remedy="tokenise the corpus with the model's tokenizer",
        )
