"""Sparse targets of a micro-batch, sampled beside the teacher's logits.

Shapes: B sequences, L positions, T = B * L, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import (
    IGNORED_LABEL,
    LogitsChunk,
    RaggedTargets,
    Replica,
    TeacherEngine,
)
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import TeacherError
from distill_pretrain.sampling.figures import DistributionFigures
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.sampling.samplers import Sampler, sample_columns
from distill_pretrain.sampling.vocab_parallel import sample_sets_parallel
from distill_pretrain.sampling.weights import BadLogits
from distill_pretrain.teacher.sampling_backend import ReadColumns

_CHUNKS_WAITING = 2


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """What the teacher says of some consecutive sequences, by each of some plans.

    Attributes:
        first: number of the first sequence.
        tokens: int32[B, L].
        sets: for each plan the targets of all T positions.
        entropy: mean entropy of the teacher in nats; like the next two of every eighth valid position of each chunk.
        uniform_share: share of those whose entropy is above 98% of log V.
        top_share: share of those whose likeliest id is the commonest likeliest id.
    """

    first: int
    tokens: npt.NDArray[np.int32]
    sets: Sequence[RaggedTargets]
    entropy: float = float("nan")
    uniform_share: float = float("nan")
    top_share: float = float("nan")

    @property
    def stop(self) -> int:
        """The number of the sequence after the last one."""
        return self.first + len(self.tokens)

    def targets(self, plan_index: int, sequence: int, offset: int, length: int) -> RaggedTargets:
        """Return the targets of `length` positions of a sequence, from `offset`, by one of the plans."""
        whole = self.sets[plan_index]
        start = (sequence - self.first) * self.tokens.shape[1] + offset
        entries = whole.entries_per_token[start : start + length]
        first = int(whole.entries_per_token[:start].sum())
        span = slice(first, first + int(entries.sum()))
        return RaggedTargets(
            kind=whole.kind,
            num_draws=whole.num_draws,
            entries_per_token=entries,
            ids=whole.ids[span],
            values=whole.values[span],
        )


def sampler_of(plan: CachePlan) -> Sampler:
    """Return the sampler that a plan describes."""
    return Sampler(
        name=plan.sampler["name"],
        num_draws=plan.num_draws,
        seed=plan.sampler["seed"],
        top_p=plan.sampler.get("top_p"),
    )


def score(
    engine: TeacherEngine,
    sequences: SequenceData,
    first: int,
    count: int,
    plans: Sequence[CachePlan],
    read: ReadColumns = host_columns,
) -> SampledBatch | None:
    """Run the teacher over `count` sequences from `first` and sample every plan's targets.

    Every rank of the engine's replica calls it with the same arguments. Of [T, V] only some chunks of rows exist at
    once. Where the vocabulary is whole on one rank, sampling a chunk overlaps the engine's next; where it is split,
    the samplers' collectives take turns with the engine's.

    `read` decides where the samplers look at the logits, which changes no target; see `columns_reader`.

    Returns:
        The targets on the replica's leader; None on its other ranks.

    Raises:
        TeacherError: NaN or infinite logits, naming the sequences; or the logits have other columns than the corpus's
            vocabulary, such as padding ones. On every rank of the replica.
    """
    replica = engine.replica
    tokens, labels = sequences.plan.unmasked.read(np.arange(first, first + count))
    positions = np.arange(tokens.size, dtype=np.uint64) + np.uint64(first * sequences.plan.seq_len)
    sampling = _Sampling(
        replica,
        sequences.vocab_size,
        [sampler_of(plan) for plan in plans],
        positions,
        labels.reshape(-1) != IGNORED_LABEL,
        read,
    )
    chunks = engine.chunks(torch.from_numpy(tokens.astype(np.int64)).to(engine.device))
    if replica.vocab_group is not None:
        for chunk in chunks:
            sampling.take(chunk)
    else:
        _sample_behind(chunks, sampling)
    error = replica.share(sampling.error(first, tokens.shape[1]))
    if error is not None:
        raise error
    return sampling.batch(first, tokens) if replica.is_leader else None


class _Sampling:
    """The targets of a micro-batch, chunk by chunk.

    Args:
        replica: of the engine.
        vocab_size: V.
        samplers: one per plan.
        positions: uint64[T].
        valid: bool[T].
        read: where the samplers look at the logits.
    """

    def __init__(
        self,
        replica: Replica,
        vocab_size: int,
        samplers: Sequence[Sampler],
        positions: npt.NDArray[np.uint64],
        valid: npt.NDArray[np.bool_],
        read: ReadColumns,
    ) -> None:
        self._replica = replica
        self._vocab_size = vocab_size
        self._samplers = samplers
        self._positions = positions
        self._valid = valid
        self._read = read
        self._figures = DistributionFigures(vocab_size)
        self._parts: list[list[RaggedTargets]] = []
        self._bad: list[int] = []
        self._columns: TeacherError | None = None

    def take(self, chunk: LogitsChunk) -> None:
        """Sample a chunk. What is wrong with it is kept for `error`: the engine must run to its end on every rank."""
        rows = slice(chunk.first, chunk.first + len(chunk.logits))
        try:
            self._parts.append(self._sets(chunk, self._positions[rows], self._valid[rows]))
        except BadLogits as error:
            self._bad += [chunk.first + row for row in error.rows]
        except TeacherError as error:
            self._columns = error

    def _sets(
        self, chunk: LogitsChunk, positions: npt.NDArray[np.uint64], valid: npt.NDArray[np.bool_]
    ) -> list[RaggedTargets]:
        if self._replica.vocab_group is not None:
            return sample_sets_parallel(
                chunk.logits,
                chunk.first_id,
                positions,
                self._samplers,
                self._replica.vocab_group,
                vocab_size=self._vocab_size,
                valid=valid,
                figures=self._figures,
                read=self._read,
            )
        require_whole_vocabulary(chunk, self._vocab_size)
        columns = self._read(chunk.logits)
        return sample_columns(
            columns, positions, self._samplers, valid=valid, figures=self._figures
        )

    def error(self, first: int, seq_len: int) -> TeacherError | None:
        """What was wrong, of sequences that start at number `first`; None if nothing was."""
        if self._columns is not None or not self._bad:
            return self._columns
        numbers = sorted({first + row // seq_len for row in self._bad})
        listed = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
        return TeacherError(
            "the teacher's logits are not finite",
            where=f"sequence{'s' if len(numbers) > 1 else ''} {listed}; {BadLogits(self._bad)}",
            remedy="check the teacher's weights and dtype; finished shards are kept",
        )

    def batch(self, first: int, tokens: npt.NDArray[np.int32]) -> SampledBatch:
        """All targets."""
        assert sum(len(part[0].entries_per_token) for part in self._parts) == tokens.size
        return SampledBatch(
            first=first,
            tokens=tokens,
            sets=[_joined(list(chunks)) for chunks in zip(*self._parts, strict=True)],
            entropy=self._figures.entropy,
            uniform_share=self._figures.uniform_share,
            top_share=self._figures.top_share,
        )


def _sample_behind(chunks: Iterator[LogitsChunk], sampling: _Sampling) -> None:
    """Sample in a thread beside the engine; at most `_CHUNKS_WAITING` chunks exist besides the one being made."""
    with ThreadPoolExecutor(1, "sampler") as worker:
        waiting: deque[Future[None]] = deque()
        for chunk in chunks:
            if len(waiting) == _CHUNKS_WAITING:
                waiting.popleft().result()
            waiting.append(worker.submit(sampling.take, chunk))
        for future in waiting:
            future.result()


def _joined(parts: list[RaggedTargets]) -> RaggedTargets:
    return RaggedTargets(
        kind=parts[0].kind,
        num_draws=parts[0].num_draws,
        entries_per_token=np.concatenate([part.entries_per_token for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        values=np.concatenate([part.values for part in parts]),
    )


def require_whole_vocabulary(chunk: LogitsChunk, vocab_size: int) -> None:
    """Refuse logits with other columns than the corpus's vocabulary, such as padding ones.

    Raises:
        TeacherError: see above.
    """
    if chunk.logits.shape[1] != vocab_size:
        raise TeacherError(
            "the teacher's logits do not have one column per token of the vocabulary",
            found=f"{chunk.logits.shape[1]} columns",
            expected=f"{vocab_size}",
            remedy="use a teacher of the corpus's tokenizer, and cut padding columns off in its engine",
        )
