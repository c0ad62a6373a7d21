"""Micro-batches of tokens, labels and cached targets for one data-parallel rank.

Shapes: B micro-batch, L sequence length, K the most entries of a position.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import NO_ENTRY, RaggedTargets, SparseTargets, TokenBatch
from distill_pretrain.data.order import VisitOrder


class SequenceSource(Protocol):
    """What this module needs of a sequence plan."""

    num_sequences: int
    seq_len: int

    def read(
        self, sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens and labels, int32[B, L] each."""
        ...


class TargetSource(Protocol):
    """What this module needs of a cache."""

    def read(self, sequence: int, tokens: npt.NDArray[np.int32]) -> RaggedTargets:
        """Targets of the L positions of one sequence."""
        ...


def pad_targets(rows: list[RaggedTargets]) -> SparseTargets:
    """B sequences of ragged targets -> ids int64[B, L, K] padded with -1, probs fp32[B, L, K] with 0."""
    lengths = np.stack([row.entries_per_token for row in rows])
    k = max(1, int(lengths.max()))
    ids = np.full((*lengths.shape, k), NO_ENTRY, dtype=np.int64)
    probs = np.zeros((*lengths.shape, k), dtype=np.float32)
    kept = np.arange(k) < lengths[..., None]
    ids[kept] = np.concatenate([row.ids for row in rows])
    probs[kept] = np.concatenate([row.probs() for row in rows])
    return SparseTargets(ids=torch.from_numpy(ids), probs=torch.from_numpy(probs))


class StudentBatches:
    """Endless micro-batches of one data-parallel rank, resumable at any step.

    The global batch of step n holds positions n * global_batch_size onwards of the visiting order, whatever the
    number of ranks and the micro-batch size.

    Args:
        plan: sequences.
        cache: targets of those sequences, or None.
        num_sequences: length of an epoch; the first so many sequences of the plan.
        seed: of the visiting order.
        global_batch_size: sequences per step over all ranks.
        micro_batch_size: sequences per batch.
        data_rank: this rank's place among `data_size`.
        data_size: data-parallel ranks.
        device: where the tensors go.
    """

    def __init__(
        self,
        plan: SequenceSource,
        cache: TargetSource | None,
        *,
        num_sequences: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.cache = cache
        self.order = VisitOrder(num_sequences, seed=seed)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.device = device

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this rank per step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def sequences(self, step: int, micro_batch: int) -> npt.NDArray[np.int64]:
        """Sequence numbers, int64[B], of one micro-batch of this rank."""
        first = step * self.global_batch_size
        first += (micro_batch * self.data_size + self.data_rank) * self.micro_batch_size
        return self.order[np.arange(first, first + self.micro_batch_size, dtype=np.int64)]

    def step_batches(self, step: int, *, with_targets: bool) -> list[TokenBatch]:
        """This rank's micro-batches of one step; targets are read only where the loss is computed."""
        return [
            self._batch(self.sequences(step, number), with_targets)
            for number in range(self.num_micro_batches)
        ]

    def _batch(self, sequences: npt.NDArray[np.int64], with_targets: bool) -> TokenBatch:
        tokens, labels = self.plan.read(sequences)
        targets = None
        if self.cache is not None and with_targets:
            padded = pad_targets(
                [self.cache.read(int(s), t) for s, t in zip(sequences, tokens, strict=True)]
            )
            targets = SparseTargets(
                ids=padded.ids.to(self.device), probs=padded.probs.to(self.device)
            )
        return TokenBatch(
            tokens=torch.from_numpy(tokens.astype(np.int64)).to(self.device),
            labels=torch.from_numpy(labels.astype(np.int64)).to(self.device),
            targets=targets,
        )
