"""The ranks that hold one copy of the teacher, working as one: the leader decides, the others score along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import TeacherEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import DistillPretrainError, TeacherError
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.teacher.sampling_backend import ReadColumns
from distill_pretrain.teacher.scoring import SampledBatch, score

Result = TypeVar("Result")


class _Order(NamedTuple):
    """What the whole replica scores next."""

    first: int
    num_sequences: int
    plans: tuple[CachePlan, ...]


class _End(NamedTuple):
    """The leader is done, or failed."""

    error: DistillPretrainError | None


class ReplicaGroup:
    """The processes that hold one copy of the teacher, as one of them sees them: its share, and the others' orders.

    Args:
        engine: this rank's share of the teacher.
        sequences: what the replica scores.
        read: where the samplers look at the logits, the same on every rank of the replica.
    """

    def __init__(
        self,
        engine: TeacherEngine,
        sequences: SequenceData,
        *,
        read: ReadColumns = host_columns,
    ) -> None:
        self.replica = engine.replica
        self.sequences = sequences
        self._engine = engine
        self._read = read
        self._in_step = False

    def run(self, action: Callable[[], Result]) -> Result | None:
        """Run `action` on the leader; it may call `score`. The other ranks score along until it ends.

        Every rank of the replica calls it; the others ignore their `action`.

        Returns:
            What `action` returned on the leader; None on the other ranks.

        Raises:
            What `action` raised, on every rank. An error in the midst of scoring reaches the others only where each
            finds it itself: they may be waiting for the leader inside the model, and the launcher ends them.
        """
        if not self.replica.is_leader:
            self._follow()
            return None
        try:
            result = action()
        except Exception as error:
            if not self._in_step:
                self.replica.share(_End(_as_told(error)))
            raise
        self.replica.share(_End(None))
        return result

    def score(self, first: int, count: int, plans: Sequence[CachePlan]) -> SampledBatch:
        """Score `count` sequences from `first`, and return their targets by each plan; on the leader, inside `run`.

        Raises:
            TeacherError: the logits are no distribution, naming the sequences.
        """
        order = _Order(first, count, tuple(plans))
        self._in_step = True
        self.replica.share(order)
        batch = score(self._engine, self.sequences, *order, self._read)
        self._in_step = False
        assert batch is not None
        return batch

    def _follow(self) -> None:
        while True:
            order: _Order | _End | None = self.replica.share(None)
            if isinstance(order, _End):
                if order.error is not None:
                    raise order.error
                return
            assert order is not None
            score(self._engine, self.sequences, *order, self._read)


def first_replica_first(group: ReplicaGroup, action: Callable[[], Result]) -> Result | None:
    """Call `group.run(action)`, on the other replicas of a job only after the first one is done with it.

    Every rank of the job calls it. A user's mistake that the first replica finds reaches every rank.
    """
    if group.replica.count == 1:
        return group.run(action)
    result, error = None, None
    if group.replica.number == 0:
        try:
            result = group.run(action)
        except DistillPretrainError as caught:
            error = caught
    errors: list[DistillPretrainError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found
    return result if group.replica.number == 0 else group.run(action)


def _as_told(error: Exception) -> DistillPretrainError:
    """What the other ranks raise; only our own errors are sure to survive the journey."""
    if isinstance(error, DistillPretrainError):
        return error
    return TeacherError(
        "the leader of this replica failed", found=f"{type(error).__name__}: {error}"
    )
