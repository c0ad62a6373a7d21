"""Engines that turn sequences into next-token logits, for capture and for evaluation."""

from __future__ import annotations

from pathlib import Path

from distill_pretrain.contracts import LogitsEngine


def open_engine(
    kind: str,
    path: Path,
    dtype: str,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer_sha256: str | None = None,
) -> LogitsEngine:
    """Load a model for scoring.

    Args:
        kind: "megatron" (a checkpoint of this project) or "hf" (a local Hugging Face folder).
        path: run, checkpoint or model folder.
        dtype: "fp32" or "bf16", arithmetic of the forward pass.
        vocab_size: V of the corpus to score.
        seq_len: L of the sequences to score.
        tokenizer_sha256: of the corpus; compared where the model knows its own.

    Raises:
        TeacherError, CheckpointError: the model cannot be loaded.
        TokenizerMismatch: the model's vocabulary or tokenizer is not the corpus's.

    A megatron engine needs the process groups of `mcore.parallel.model_parallel`.
    """
    if kind == "megatron":
        from distill_pretrain.teacher.engines.megatron import MegatronEngine

        return MegatronEngine(
            path,
            dtype,
            vocab_size=vocab_size,
            seq_len=seq_len,
            tokenizer_sha256=tokenizer_sha256,
        )
    from distill_pretrain.teacher.engines.hf import HFEngine

    return HFEngine(path, dtype, vocab_size=vocab_size, seq_len=seq_len)
