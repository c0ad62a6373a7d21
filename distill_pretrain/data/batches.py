"""Micro-batches of tokens, labels and cached targets for one data-parallel, context-parallel rank.

Shapes: B micro-batch, L sequence length, P positions of this rank (L, or L / context_size), K the most entries of a
position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import (
    IGNORED_LABEL,
    NO_ENTRY,
    RaggedTargets,
    TokenBatch,
)
from distill_pretrain.corpus.sequence_plan import pieces_of
from distill_pretrain.data.blend import BlendOrder
from distill_pretrain.data.ragged import PackedTargets
from distill_pretrain.data.retry import read_with_retries
from distill_pretrain.processes.context import context_spans
from distill_pretrain.processes.watchdog import alive


class SequenceSource(Protocol):
    """What this module needs of a sequence plan."""

    num_sequences: int
    seq_len: int

    def read(
        self, sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Read tokens and labels, int32[B, L] each."""
        ...


class TargetSource(Protocol):
    """What this module needs of a cache; with `read_threads` above 1 it must serve several threads at once."""

    def read(
        self,
        sequence: int,
        tokens: npt.NDArray[np.int32],
        start: int = 0,
        stop: int | None = None,
    ) -> RaggedTargets:
        """Read the targets of positions [start, stop) of one sequence, whose tokens int32[L] are given whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """One corpus of a blend.

    Attributes:
        plan: its sequences.
        cache: their targets, or None.
        num_sequences: length of an epoch; the first so many sequences of the plan.
        weight: its share beside the other sources.
        document_end: where its documents are separate the token that ends every one.
        label_weights: gives those of sequences, float32[B, L]; None for 1.
    """

    plan: SequenceSource
    cache: TargetSource | None
    num_sequences: int
    weight: float = 1.0
    document_end: int | None = None
    label_weights: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A micro-batch in CPU memory: ids of 4 bytes, where the `TokenBatch` it becomes has 8.

    Attributes:
        tokens: int32[B, P].
        labels: int32[B, P], -100 where there is none.
        targets: packed; None without targets.
        pieces: of separate documents, see `TokenBatch`.
        weights: float32[B, P], see `TokenBatch`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    targets: PackedTargets | None
    pieces: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def pinned(self) -> HostBatch:
        """Copy the batch into page-locked memory, from which a GPU copies while the CPU goes on."""
        return HostBatch(
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            targets=None if self.targets is None else self.targets.pinned(),
            pieces=self.pieces,
            weights=None if self.weights is None else self.weights.pin_memory(),
        )

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch as a model takes it; ids are widened to int64, and targets padded, on the device."""

        def moved(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        labels = moved(self.labels).long()
        return TokenBatch(
            tokens=moved(self.tokens).long(),
            labels=labels,
            targets=None if self.targets is None else self.targets.to(device, labels),
            pieces=self.pieces,
            weights=None if self.weights is None else moved(self.weights),
        )


def micro_batches(
    batches: Sequence[HostBatch], device: torch.device, *, readers: int
) -> list[Iterator[TokenBatch]]:
    """Return an iterator for each reader.

    A batch goes to the device once the first reader takes it, and stays until the last one has.

    Args:
        batches: in order.
        device: where they go.
        readers: how many iterators over all of them.
    """
    return list(tee((batch.to(device) for batch in batches), readers))


def pad_targets(
    parts: Sequence[RaggedTargets], *, rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Pad ragged targets to rectangles: ids int32[B, P, K] with -1, probs fp32[B, P, K] with 0.

    Args:
        parts: targets of B * P consecutive positions in all, in any pieces and of any kinds.
        rows: B.
    """
    lengths = np.concatenate([part.entries_per_token for part in parts]).reshape(rows, -1)
    k = max(1, int(lengths.max()))
    ids = np.full((*lengths.shape, k), NO_ENTRY, dtype=np.int32)
    probs = np.zeros((*lengths.shape, k), dtype=np.float32)
    kept = np.arange(k) < lengths[..., None]
    ids[kept] = np.concatenate([part.ids for part in parts])
    probs[kept] = np.concatenate([part.probs() for part in parts])
    return ids, probs


def drop_targets(
    ids: npt.NDArray[np.int32], probs: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]
) -> None:
    """Take away the targets [B, P, K] of positions without a label [B, P], such as those that the loss leaves out."""
    without = labels == IGNORED_LABEL
    ids[without] = NO_ENTRY
    probs[without] = 0


class StudentBatches:
    """Endless micro-batches of one rank, resumable at any step.

    The global batch of step n holds positions first_sequence + n * global_batch_size onwards of the visiting order,
    whatever the number of ranks and the micro-batch size. Not for use by several threads at once.

    Args:
        sources: corpora of one seq_len, all with caches or all without.
        seed: of the visiting order.
        global_batch_size: sequences per step over all ranks.
        micro_batch_size: sequences per batch.
        data_rank: this rank's place among `data_size`.
        data_size: data-parallel ranks.
        device: where the tensors go.
        context_rank: this rank's place among `context_size`.
        context_size: ranks that share each sequence; see `context_spans`.
        read_retry_s: see `DataConfig`.
        read_threads: threads that read the targets of a step; 1 reads them in the caller's.
        first_sequence: position of the visiting order that step 0 begins with.

    Attributes:
        seq_len: L.
        positions: int64[P], the places in the sequence that this rank's columns hold (its position ids).
        has_targets: whether there are caches.
    """

    def __init__(
        self,
        sources: Sequence[BatchSource],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        device: torch.device,
        context_rank: int = 0,
        context_size: int = 1,
        read_retry_s: float = 0.0,
        read_threads: int = 1,
        first_sequence: int = 0,
    ) -> None:
        self.sources = tuple(sources)
        (self.seq_len,) = {source.plan.seq_len for source in self.sources}
        (without_targets,) = {source.cache is None for source in self.sources}
        self.has_targets = not without_targets
        self.order = BlendOrder(
            [source.num_sequences for source in self.sources],
            [source.weight for source in self.sources],
            seed=seed,
        )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.device = device
        self._read_retry_s = read_retry_s
        self._read_threads = read_threads
        self._readers: ThreadPoolExecutor | None = None
        self._first_sequence = first_sequence
        self._spans = context_spans(self.seq_len, context_rank, context_size)
        self.positions = np.concatenate([np.arange(*span, dtype=np.int64) for span in self._spans])

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches of this rank per step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    @property
    def bytes_read(self) -> int:
        """The bytes that this rank has read from the caches so far."""
        return sum(int(getattr(source.cache, "bytes_read", 0)) for source in self.sources)

    def sequences(
        self, step: int, micro_batch: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return source and sequence numbers, int64[B] each, of one micro-batch of this rank."""
        first = self._first_sequence + step * self.global_batch_size
        first += (micro_batch * self.data_size + self.data_rank) * self.micro_batch_size
        return self.order.span(first, self.micro_batch_size)

    def step_batches(self, step: int, *, with_targets: bool) -> list[TokenBatch]:
        """Read this rank's micro-batches of one step; targets are read only where the loss is computed."""
        return [batch.to(self.device) for batch in self.host_batches(step, with_targets)]

    def host_batches(self, step: int, with_targets: bool) -> list[HostBatch]:
        """Read the same batches, before they go to the device; pinned when that is a GPU."""
        numbers = [self.sequences(step, number) for number in range(self.num_micro_batches)]
        texts = [self._text(*of_batch) for of_batch in numbers]
        reads = [
            partial(self._read_targets, source, sequence, row, span)
            for (sources, sequences), (tokens, _) in zip(numbers, texts, strict=True)
            for source, sequence, row in zip(sources, sequences.tolist(), tokens, strict=True)
            for span in self._spans
        ]
        # Whatever order they come in, they are taken in this one.
        parts = self._in_order(reads) if with_targets and self.has_targets else iter(())
        batches = []
        for of_batch, text in zip(numbers, texts, strict=True):
            batch = self._batch(*of_batch, *text, parts)
            batches.append(batch.pinned() if self.device.type == "cuda" else batch)
        return batches

    def close(self) -> None:
        """End the threads that read; a later read starts them anew."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
            self._readers = None

    def _in_order(self, reads: Sequence[Callable[[], RaggedTargets]]) -> Iterator[RaggedTargets]:
        """What the reads return, in their order; the first failure in that order is raised, and no read goes on."""
        if self._read_threads == 1:
            yield from (read() for read in reads)
            return
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._read_threads, "read")
        try:
            for future in [self._readers.submit(read) for read in reads]:
                yield future.result()
        except BaseException:
            self.close()
            raise

    def _read_targets(
        self,
        source: int,
        sequence: int,
        tokens: npt.NDArray[np.int32],
        span: tuple[int, int],
    ) -> RaggedTargets:
        cache = self.sources[source].cache
        assert cache is not None
        read = partial(cache.read, sequence, tokens, *span)
        targets = read_with_retries(read, retry_s=self._read_retry_s)
        alive()
        return targets

    def _text(
        self, sources: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens and labels of sequences, int32[B, L] each."""
        shape = (len(sequences), self.seq_len)
        tokens, labels = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for number in np.unique(sources):
            rows = sources == number
            tokens[rows], labels[rows] = self.sources[number].plan.read(sequences[rows])
        alive()
        return tokens, labels

    def _batch(
        self,
        sources: npt.NDArray[np.int64],
        sequences: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int32],
        labels: npt.NDArray[np.int32],
        parts: Iterator[RaggedTargets],
    ) -> HostBatch:
        """A micro-batch of these tokens and labels [B, L], and of the next B * spans of the parts, if there are any."""
        targets = list(islice(parts, len(sequences) * len(self._spans)))
        return HostBatch(
            tokens=torch.from_numpy(tokens[:, self.positions]),
            labels=torch.from_numpy(labels[:, self.positions]),
            targets=PackedTargets.of(targets, rows=len(sequences)) if targets else None,
            pieces=self._pieces(sources, tokens),
            weights=self._weights(sources, sequences),
        )

    def _weights(
        self, sources: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]
    ) -> torch.Tensor | None:
        """See `TokenBatch`. All ranks have them if any corpus has, since they say how losses are averaged."""
        if all(source.label_weights is None for source in self.sources):
            return None
        weights = np.ones((len(sequences), self.seq_len), np.float32)
        for number in np.unique(sources):
            weights_of = self.sources[number].label_weights
            if weights_of is not None:
                weights[sources == number] = weights_of(sequences[sources == number])
        return torch.from_numpy(weights[:, self.positions])

    def _pieces(
        self, sources: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]
    ) -> torch.Tensor | None:
        """See `TokenBatch`."""
        ends = [self.sources[number].document_end for number in sources]
        if all(end is None for end in ends):
            return None
        parts = []
        for row, end in enumerate(ends):
            assert end is not None, "a blend of joined and separate documents"
            part = pieces_of(tokens[row : row + 1], end)
            part[:, 0] = row
            parts.append(part)
        return torch.from_numpy(np.concatenate(parts))
