"""What the samplers ask of a rank's columns of the logits, wherever those lie.

The numpy answers are in `host`; an accelerator's are the same bits, but for `RowMoments`. Legend: T rows,
V columns of this rank, N draws, E entries in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import DrawnEntries, LikeliestEntries, RowMoments
from distill_pretrain.sampling.kinds import SAMPLERS
from distill_pretrain.sampling.philox import Uint64Array, draws64

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draws:
    """The random numbers of a sampler at some positions.

    Attributes:
        name: one of SAMPLERS that draws.
        num_draws: N.
        seed: key, in [0, 2**64).
        positions: uint64[P], the sequence plan's sequence * seq_len + offset.
    """

    name: str
    num_draws: int
    seed: int
    positions: Uint64Array

    @property
    def stream(self) -> int:
        """The Philox stream of the sampler."""
        stream = SAMPLERS[self.name].stream
        assert stream is not None, self.name
        return stream

    @cached_property
    def words(self) -> Uint64Array:
        """The uniform words of all positions, uint64[P, N], or [P, 1] where one is drawn.

        They are made at once: Philox in numpy pays per call, not per word.
        """
        per_position = 1 if SAMPLERS[self.name].draws_once else self.num_draws
        return draws64(self.seed, self.stream, self.positions, per_position)


class Block(Protocol):
    """Some rows of this rank's columns."""

    def largest(self) -> Float32Array:
        """Return the largest logit of each row, float32[T]; see `weights.largest`."""
        ...

    def weigh(self, maxima: Float32Array) -> Int64Array:
        """Sum the integer weights of each row, int64[T], by the maxima over all ranks; call it before those below."""
        ...

    def drawn(
        self, draws: Draws, rows: slice, below: Int64Array, totals: Int64Array
    ) -> DrawnEntries:
        """Find those of the draws that fall on this rank's columns.

        Args:
            draws: of positions among which the block's are `rows`.
            rows: T of them.
            below: int64[T], weights of the ids before this rank's.
            totals: int64[T], weights of all ids.
        """
        ...

    def likeliest(self, k: int) -> LikeliestEntries:
        """Find the k largest of this rank's logits, ties to the lower column; -inf is never among them."""
        ...

    def moments(self, rows: Int64Array) -> RowMoments:
        """Compute the moments of some rows of the block."""
        ...


class Columns(Protocol):
    """This rank's columns of all rows."""

    @property
    def num_rows(self) -> int:
        """T, the number of rows."""
        ...

    @property
    def width(self) -> int:
        """V >= 1, the number of columns; no column counts as one of -inf."""
        ...

    @property
    def rows_at_once(self) -> int | None:
        """The number of rows of a block, the same on every rank; None leaves it to the split."""
        ...

    def block(self, rows: Int64Array) -> Block:
        """Take the rows of these numbers, ascending."""
        ...


class Split(Protocol):
    """How the columns of the logits are spread over ranks, and what the ranks tell each other of their rows."""

    first_id: int
    """Token id of this rank's column 0."""

    def rows_at_once(self, columns: int) -> int:
        """Return the number of rows whose weights are held at once; the same on every rank."""
        ...

    def maxima(self, own: Float32Array) -> Float32Array:
        """Return the largest of the ranks' values of each row, float32[T], none of them NaN."""
        ...

    def totals(self, own: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the sums over lower ids' ranks, and over all ranks, int64[T] each."""
        ...

    def gathered(self, own: list[npt.NDArray[Any]]) -> list[list[npt.NDArray[Any]]]:
        """Return every rank's arrays of one dimension, by ascending ids."""
        ...
