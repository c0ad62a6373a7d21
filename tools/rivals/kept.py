"""What every way to keep a teacher's distribution has in common, and what a loss makes of the kept entries.

Shapes: B sequences of a chunk, L positions of each, T = B * L, V vocabulary, K most entries of a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Use = Literal["as drawn", "ghost", "renormalised", "both renormalised"]
"""What the loss that goes with a layout does about the mass that is missing:

as drawn           nothing is missing: sampled targets have mass 1
ghost              one more token, in teacher and student, has all the mass outside the kept ids
renormalised       the kept probabilities are divided by their sum; the student's softmax is over all ids
both renormalised  softmax over the kept ids alone, in teacher and student
"""


@dataclass(frozen=True)
class Chunk:
    """What is written at a time.

    Attributes:
        logits: float32[T, V] of the teacher.
        tokens: int32[B, L], its inputs.
        positions: uint64[T], sequence * L + offset.
    """

    logits: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Kept:
    """What a layout gives back of a chunk.

    Attributes:
        ids: integer[T, K], distinct in a row, -1 where there is none.
        probs: float32[T, K], 0 where there is no id.
    """

    ids: npt.NDArray[Any]
    probs: npt.NDArray[np.float32]


class Layout(Protocol):
    """One way to keep targets: written chunk by chunk, then finished, then read.

    Attributes:
        name: in the tables.
        basis: whose code wrote and read, or what it was re-made from.
        use: see `Use`.
    """

    name: str
    basis: str
    use: Use

    def write(self, chunk: Chunk) -> None:
        """Keep a chunk: from the logits on, top-k, softmax and draws included."""

    def finish(self) -> int:
        """Have everything on disk; its bytes."""

    def read(self) -> Iterator[Any]:
        """The chunks in the order they were written, each as the layout's own loss takes it."""

    def kept(self, read: Any) -> Kept:
        """What `read` yielded, in one form for all layouts."""


def dense(kept: Kept, vocab_size: int) -> Float64Array:
    """float64[T, V]: the kept probabilities at their ids, 0 elsewhere."""
    full = np.zeros((len(kept.ids), vocab_size))
    rows, columns = np.nonzero(kept.ids >= 0)
    full[rows, kept.ids[rows, columns]] = kept.probs[rows, columns]
    return full


def implied(kept: Kept, student: Float64Array, use: Use) -> Float64Array:
    """float64[T, V]: the target t for which the loss's gradient by the student's logits is `student - t`.

    Of the whole distribution that is the teacher's. A ghost token's is the missing mass spread over the other ids as
    the student spreads its own; where both sides are renormalised, ids outside get no gradient, and those inside
    q / Q - p / P, with Q and P the kept masses.

    Args:
        kept: of T positions.
        student: float64[T, V], its softmax q.
        use: what the loss does.
    """
    target = dense(kept, student.shape[1])
    if use == "as drawn":
        return target
    mass = target.sum(axis=1, keepdims=True)
    if use == "renormalised":
        renormalised: Float64Array = target / mass
        return renormalised
    inside = np.zeros(target.shape, np.bool_)
    rows, columns = np.nonzero(kept.ids >= 0)
    inside[rows, kept.ids[rows, columns]] = True
    student_mass = (student * inside).sum(axis=1, keepdims=True)
    if use == "ghost":
        outside = np.clip(1 - student_mass, np.finfo(float).tiny, None)
        missing = np.clip(1 - mass, 0, None)
        return np.where(inside, target, missing * student / outside)
    return np.where(inside, student - student / student_mass + target / mass, student)
