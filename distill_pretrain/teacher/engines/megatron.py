"""Scores with megatron-core: a checkpoint that this project trained, or a Hugging Face model it can represent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.identity import TrainedModel, trained_model
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.checkpoint.whole import load_model_part, model_logits
from distill_pretrain.contracts import LogitsChunk
from distill_pretrain.errors import TeacherError, TokenizerMismatch
from distill_pretrain.kernels.sparse_kd.cap import soft_capped
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.mcore.model.layout import scoring_layout
from distill_pretrain.processes.process import local_device
from distill_pretrain.teacher.engines.folder import (
    CONFIG_FILE,
    another_vocabulary,
    files_identity,
    require_known_ids,
    require_positions,
)
from distill_pretrain.teacher.engines.head import ChunkedHead
from distill_pretrain.teacher.engines.weights import weight_files


class MegatronEngine:
    """A model of megatron-core, or this process's part of one; see `open_engine` and `open_teacher_engine`.

    The architecture comes from the checkpoint or folder itself.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        vocab_size: int,
        seq_len: int,
        tokenizer_digests: tuple[str, ...] = (),
        tensor: int = 1,
        pipeline: int = 1,
        head_chunk_tokens: int = 1024,
    ) -> None:
        from distill_pretrain.mcore.model.forward import (
            ForwardOnly,
            head_shard_rank,
            scoring_replica,
        )

        self.vocab_size = vocab_size
        self.device = local_device()
        self.replica = scoring_replica()
        self._identity: dict[str, Any] = {"kind": "megatron", "dtype": dtype}
        parallel = scoring_layout(tensor, pipeline)
        if (path / CONFIG_FILE).is_file():
            self._model = self._load_folder(path, parallel, seq_len)
        else:
            self._model = self._load_checkpoint(path, parallel, seq_len, tokenizer_digests)
        self._identity |= {"head_chunk_tokens": head_chunk_tokens}
        self._identity |= {k: v for k, v in (("tensor", tensor), ("pipeline", pipeline)) if v > 1}
        self._forward = ForwardOnly(self._model)
        self._head: ChunkedHead | None = None
        cap = self._forward.logit_cap
        if self._forward.head is not None:
            self._head = ChunkedHead(
                self._forward.head,
                first_id=head_shard_rank() * len(self._forward.head),
                vocab_size=vocab_size,
                chunk_tokens=head_chunk_tokens,
                finish=None if cap is None else (lambda z: soft_capped(z, cap).to(z.dtype)),
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Engine, arithmetic, layout and weights."""
        return self._identity

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits float32[B, L, V] for tokens int64[B, L], of a model that this process holds alone."""
        assert self.replica.group is None
        return model_logits(self._model, tokens, self.vocab_size)

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`."""
        hidden = self._forward.hidden(tokens)
        if self._head is not None:
            assert hidden is not None
            yield from self._head.chunks(hidden)

    def _load_checkpoint(
        self, path: Path, parallel: ParallelConfig, seq_len: int, tokenizer_digests: tuple[str, ...]
    ) -> torch.nn.Module:
        checkpoint = find_checkpoint(path)
        trained = trained_model(checkpoint.identity, checkpoint.folder)
        _require_same_tokens(path, trained, self.vocab_size, tokenizer_digests)
        if trained.model.arch == "gpt2" and seq_len > trained.seq_len:
            raise TeacherError(
                "the sequences are longer than the model's learned positions",
                where=path,
                found=seq_len,
                expected=f"at most {trained.seq_len}",
            )
        self._identity |= {"step": checkpoint.step, "checkpoint_sha256": checkpoint.sha256}
        return load_model_part(checkpoint, parallel, precision=self._identity["dtype"])

    def _load_folder(self, path: Path, parallel: ParallelConfig, seq_len: int) -> torch.nn.Module:
        from distill_pretrain.checkpoint.hf import load_hf_weights, read_hf_model
        from distill_pretrain.mcore.model.chunks import build_model_chunks

        found = read_hf_model(path)
        require_known_ids(path, found.vocab_size, self.vocab_size)
        require_positions(path, found.max_positions, seq_len)
        chunks = build_model_chunks(
            found.model,
            parallel,
            vocab_size=found.vocab_size,
            seq_len=found.max_positions,
            precision=self._identity["dtype"],
            seed=None,
        )
        load_hf_weights(chunks, path)
        self._identity |= {
            "model_type": found.family,
            "files": files_identity(path, weight_files(path)),
        }
        return chunks[0].eval()


def _require_same_tokens(
    path: Path, trained: TrainedModel, vocab_size: int, tokenizer_digests: tuple[str, ...]
) -> None:
    if trained.vocab_size != vocab_size:
        raise TokenizerMismatch(
            "the model's vocabulary is not the corpus's",
            where=path,
            found=f"{trained.vocab_size} ids",
            expected=f"{vocab_size} ids",
            remedy=another_vocabulary(trained.vocab_size, vocab_size),
        )
    known = trained.tokenizer_sha256
    if known and tokenizer_digests and known not in tokenizer_digests:
        raise TokenizerMismatch(
            "the model was trained with another tokenizer",
            where=path,
            found=f"tokenizer {known[:12]}",
            expected=f"tokenizer {tokenizer_digests[0][:12]}",
            remedy="tokenise the corpus with the model's tokenizer",
        )
