"""Any engine over documents one by one, for `data.documents: separate`.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill_pretrain.contracts import LogitsChunk, LogitsEngine, Replica, TeacherEngine
from distill_pretrain.corpus.sequence_plan import pieces_of
from distill_pretrain.errors import ConfigError


class DocumentsApart:
    """An engine that is shown every document of a sequence alone.

    So nothing of one reaches another, whatever the model is made of, its positions start anew, and no matrix [L, L] is
    made. Every pass has one document: short ones leave a GPU idle.

    Args:
        engine: a `LogitsEngine` or a `TeacherEngine`, whole in this process.
        document_end: token that ends every document.

    Attributes:
        engine: the engine itself, for texts that are one document.

    Raises:
        ConfigError: several processes hold the engine together.
    """

    def __init__(self, engine: Any, document_end: int) -> None:
        if getattr(engine, "replica", Replica()).group is not None:
            raise ConfigError(
                "a model that several processes hold together does not keep documents apart",
                where="data.documents, teacher, eval",
                found="separate, and tensor, pipeline, fsdp or zero above 1",
                expected="kind hf or megatron, whole in each process",
                remedy="hold the model in one process, or set data.documents=joined",
            )
        self.engine = engine
        self._document_end = document_end
        self.vocab_size: int = engine.vocab_size
        self.device: torch.device = engine.device

    @property
    def replica(self) -> Replica:
        """The replica of the engine inside."""
        replica: Replica = self.engine.replica
        return replica

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the engine inside; that documents are apart is part of the sequence plan."""
        identity: dict[str, Any] = self.engine.identity
        return identity

    @property
    def has_chunks(self) -> bool:
        """Whether the engine inside has them."""
        return bool(getattr(self.engine, "has_chunks", hasattr(self.engine, "chunks")))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `LogitsEngine`."""
        engine: LogitsEngine = self.engine
        rows: list[list[torch.Tensor]] = [[] for _ in tokens]
        for row, start, stop in self._pieces(tokens):
            rows[row].append(engine.logits(tokens[row : row + 1, start:stop])[0])
        return torch.stack([torch.cat(parts) for parts in rows])

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """See `TeacherEngine`."""
        engine: TeacherEngine = self.engine
        for row, start, stop in self._pieces(tokens):
            before = row * tokens.size(1) + start
            for chunk in engine.chunks(tokens[row : row + 1, start:stop]):
                yield replace(chunk, first=before + chunk.first)
                del chunk  # before the next is made

    def _pieces(self, tokens: torch.Tensor) -> list[list[int]]:
        pieces: list[list[int]] = pieces_of(tokens.cpu().numpy(), self._document_end).tolist()
        return pieces
