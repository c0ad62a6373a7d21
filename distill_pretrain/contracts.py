"""Values that cross package borders.

Shapes: B sequences, L positions (seq_len), T = B * L tokens, K kept entries, V vocabulary (real, unpadded),
E entries in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

# For annotations alone: what only looks at files does without the seconds that torch takes to import.
if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

IGNORED_LABEL = -100
"""Label of a position that has no next token; it counts in no loss and in no average."""

NO_ENTRY = -1
"""Target id that pads a row of `SparseTargets`."""

TargetKind = Literal["counts", "logprobs"]

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RaggedTargets:
    """Sparse teacher targets of T consecutive positions, as stored (compressed rows).

    Attributes:
        kind: "counts": values are draw counts that sum to num_draws in each non-empty row;
            "logprobs": values are natural-log teacher probabilities (top-k), row mass <= 1.
        num_draws: draws per position (counts) or the k of top-k (logprobs): the most entries a row can have.
        entries_per_token: int32[T]; 0 where the position has no target.
        ids: int32[E], distinct within a row. The samplers give them ascending, which the raw codec requires; the
            entropy codec takes any order and gives the frequency ranks ascending.
        values: int32[E] counts, or float32[E] log-probabilities.
    """

    kind: TargetKind
    num_draws: int
    entries_per_token: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[Any]

    def probs(self) -> npt.NDArray[np.float32]:
        """Return the target probability of every entry, float32[E]."""
        values = self.values.astype(np.float32)
        probs: npt.NDArray[np.float32] = (
            values / np.float32(self.num_draws) if self.kind == "counts" else np.exp(values)
        )
        return probs


class DrawnEntries(NamedTuple):
    """What was drawn from a rank's columns of T rows, row by row, columns ascending in a row.

    Attributes:
        lengths: integer[T], distinct columns of a row.
        columns: integer[E].
        counts: integer[E].
    """

    lengths: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    counts: npt.NDArray[Any]


class LikeliestEntries(NamedTuple):
    """The columns of the largest logits, row by row, ascending in a row.

    Attributes:
        lengths: integer[T].
        columns: integer[E].
        logits: float32[E].
        weights: int64[E].
    """

    lengths: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    logits: npt.NDArray[np.float32]
    weights: npt.NDArray[np.int64]


class RowMoments(NamedTuple):
    """This rank's part of what is measured of some distributions: entropy and likeliest id.

    Attributes:
        depths: float64[T], sum of w (max z - z) over the columns, w the integer weights.
        columns: integer[T], of the largest logit, the lowest of equals.
    """

    depths: npt.NDArray[np.float64]
    columns: npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """Sparse teacher targets as the loss reads them.

    Attributes:
        ids: int64[..., K], padded with -1.
        probs: float32[..., K], zero where padded.
    """

    ids: torch.Tensor
    probs: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What a language model trains on.

    Attributes:
        tokens: int64[B, L] inputs.
        labels: int64[B, L] next tokens, -100 where there is none.
        targets: sparse teacher targets [B, L, K], or None for plain cross-entropy.
        pieces: int64[N, 3] on the CPU, (row, start, stop) of the documents where these are separate, in order and
            without gaps, of whole sequences where ranks share them; None where they are joined.
        weights: float32[B, L], of each label in the loss and in the mean that it is; None for 1.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    targets: SparseTargets | None = None
    pieces: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class LogitsEngine(Protocol):
    """Something that scores sequences: a teacher at capture, any model at evaluation."""

    vocab_size: int
    """V: real vocabulary of the logits it returns."""

    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the model from others, as JSON values: engine kind, weight-file sha256s, dtype.

        It is recorded in the cache's plan.
        """
        ...

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute next-token logits, float32[B, L, V], for tokens int64[B, L] (causal, no padding)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogitsChunk:
    """Next-token logits of some consecutive positions over this rank's part of the vocabulary.

    Attributes:
        first: number of the first position among the B * L of a micro-batch.
        first_id: token id of column 0.
        logits: float32, bf16 or fp16 [rows, V_local], as the model computed them; real vocabulary only, and none
            where this rank holds padding alone.
    """

    first: int
    first_id: int
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The processes that hold one copy of a model together.

    Attributes:
        group: all of them; None for a process that holds the model alone.
        vocab_group: those among which the LM head's columns are split, this rank among them; None where the columns
            are whole on one rank, and on ranks without the LM head.
        leader: global rank that gets the results; it has the LM head.
        number: of this copy among the job's copies, from 0.
        count: copies in the job.
    """

    group: ProcessGroup | None = None
    vocab_group: ProcessGroup | None = None
    leader: int = 0
    number: int = 0
    count: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank gets the results."""
        if self.group is None:
            return True
        import torch.distributed as dist

        return dist.get_rank() == self.leader

    def share(self, value: Value) -> Value:
        """Return the leader's value on every rank of the replica; the others' is ignored."""
        if self.group is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=self.leader, group=self.group)
        return box[0]


class TeacherEngine(Protocol):
    """A teacher at capture, held by one process or by several together (`replica`)."""

    vocab_size: int
    """V: real vocabulary over all ranks."""

    device: torch.device

    replica: Replica
    """The processes that hold this copy of the teacher; other copies score other sequences."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the teacher from others, as JSON values.

        That is its engine kind, the sha256s of its weight files, its dtype, and what else moves float rounding.
        """
        ...

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """Compute the logits of tokens int64[B, L], chunk by chunk, so that [B * L, V] is never whole.

        Every rank of the replica calls it with the same tokens and exhausts it. Ranks with the LM head get the same
        chunks, each its own columns; the others get none.
        """
        ...
