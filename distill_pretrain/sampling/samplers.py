"""Sparse targets from teacher logits, by the samplers of `kinds.SAMPLERS`.

Legend: T positions, V vocabulary, N draws (the k of top-k, the cap of top-p), E entries in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.sampling.columns import Block, Columns, Draws, Split
from distill_pretrain.sampling.figures import LOOK_EVERY, DistributionFigures
from distill_pretrain.sampling.host import HostColumns, likeliest
from distill_pretrain.sampling.kinds import SAMPLERS
from distill_pretrain.sampling.philox import Uint64Array, umul64hi
from distill_pretrain.sampling.weights import BadLogits, log_sums, usable_maxima

MAX_VOCAB = 1 << 20
# The int64 cumulative weights of a chunk of rows should stay in a 1 MiB L2 cache.
_CHUNK_ELEMENTS = 65536

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a row of logits becomes a row of targets.

    Attributes:
        name: one of SAMPLERS.
        num_draws: N >= 1; of a sampler that draws nothing the most entries of a row.
        seed: key of the draws, in [0, 2**64); unused where nothing is drawn.
        top_p: mass at which "topp" stops, 0 < top_p < 1; None for the others.
    """

    name: str
    num_draws: int
    seed: int
    top_p: float | None = None

    def __post_init__(self) -> None:
        assert self.name in SAMPLERS, self.name
        assert self.num_draws >= 1 and 0 <= self.seed < 1 << 64, (self.num_draws, self.seed)
        assert (self.top_p is not None) == ("top_p" in SAMPLERS[self.name].own_settings), self
        assert self.top_p is None or 0 < self.top_p < 1, self.top_p

    @property
    def kind(self) -> TargetKind:
        """What an entry's value is: a count of draws, or a log-probability."""
        return SAMPLERS[self.name].values


def sample_targets(
    logits: Float32Array,
    positions: Uint64Array,
    *,
    sampler: str,
    num_draws: int,
    seed: int,
    top_p: float | None = None,
    valid: npt.NDArray[np.bool_] | None = None,
) -> RaggedTargets:
    """Sample sparse targets by one sampler, whose attributes are given one by one; see `sample_sets`."""
    chosen = Sampler(name=sampler, num_draws=num_draws, seed=seed, top_p=top_p)
    return sample_sets(logits, positions, [chosen], valid=valid)[0]


def sample_sets(
    logits: Float32Array,
    positions: Uint64Array,
    samplers: Sequence[Sampler],
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    figures: DistributionFigures | None = None,
) -> list[RaggedTargets]:
    """Sample sparse targets of T positions by each of several samplers, which share the softmax.

    A row depends on its own logits and position and on its sampler only, not on the other samplers.

    Args:
        logits: float32[T, V], V <= 2**20; -inf excludes a token.
        positions: uint64[T], the sequence plan's sequence * seq_len + offset.
        samplers: one or more.
        valid: bool[T]; a row where it is False is not looked at and gets no entry.
        figures: told of some of the rows.

    Returns:
        Targets of each sampler, in the order given.

    Raises:
        BadLogits: rows (numbered in `logits`) hold NaN, +inf or nothing but -inf.
    """
    return sample_columns(HostColumns(logits), positions, samplers, valid=valid, figures=figures)


def sample_columns(
    columns: Columns,
    positions: Uint64Array,
    samplers: Sequence[Sampler],
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    figures: DistributionFigures | None = None,
) -> list[RaggedTargets]:
    """Sample as `sample_sets` does, from logits that lie on any device."""
    return sample_split(
        columns, positions, samplers, WholeVocabulary(), valid=valid, figures=figures
    )


class WholeVocabulary:
    """A `Split` over one rank."""

    first_id = 0

    def rows_at_once(self, columns: int) -> int:
        """Return the number of rows whose logits stay in the processor's cache together."""
        return max(1, _CHUNK_ELEMENTS // columns)

    def maxima(self, own: Float32Array) -> Float32Array:
        """Return the maxima over all columns: its own, since it holds them all."""
        return own

    def totals(self, own: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return zeros for what lies before, and its own sums for all."""
        return np.zeros_like(own), own

    def gathered(self, own: list[npt.NDArray[Any]]) -> list[list[npt.NDArray[Any]]]:
        """Return what every holder of columns has: its own alone."""
        return [own]


def sample_split(
    columns: Columns,
    positions: Uint64Array,
    samplers: Sequence[Sampler],
    split: Split,
    *,
    valid: npt.NDArray[np.bool_] | None = None,
    figures: DistributionFigures | None = None,
) -> list[RaggedTargets]:
    """Sample as `sample_sets` does, from this rank's columns; every rank gets the targets of the whole rows.

    Weights are integers, so their sums do not depend on who adds them; each rank emits the draws that fall into its
    own stretch of [0, W), or the likeliest of its own ids, from which the likeliest of all are then chosen.
    """
    assert positions.shape == (columns.num_rows,) and 1 <= columns.width <= MAX_VOCAB
    positions = positions.astype(np.uint64)
    rows = np.arange(columns.num_rows) if valid is None else np.flatnonzero(valid)
    sets = [_GrowingSet(sampler, positions[rows]) for sampler in samplers]
    moments = _Moments()
    per_chunk = columns.rows_at_once or split.rows_at_once(columns.width)
    bad: list[int] = []
    for start in range(0, len(rows), per_chunk):
        numbers = rows[start : start + per_chunk]
        try:
            chunk = _Chunk(columns.block(numbers), split)
            for grown in sets:
                grown.add(chunk, slice(start, start + per_chunk))
            if figures is not None:
                # Every LOOK_EVERY-th of the valid rows, wherever chunks begin: the same figures for any split.
                moments.add(chunk, np.arange(-start % LOOK_EVERY, len(numbers), LOOK_EVERY))
        except BadLogits as error:
            bad.extend(int(numbers[row]) for row in error.rows)
    if bad:
        raise BadLogits(bad)
    arrays = [array for grown in sets for array in grown.arrays()] + moments.arrays()
    everyone = [iter(of_rank) for of_rank in split.gathered(arrays)]
    targets = [grown.targets(everyone, rows, columns.num_rows) for grown in sets]
    if figures is not None:
        moments.report(everyone, figures)
    return targets


class _Chunk:
    """Some rows of this rank's columns, and what the ranks know of them together.

    Args:
        block: the rows.
        split: over the ranks.

    Attributes:
        own_maxima: float32[T], over this rank's columns.
        maxima: float32[T], over all ranks.
        below: int64[T], weight of the ids before this rank's.
        totals: int64[T], W.

    Raises:
        BadLogits: see `row_maxima`; on every rank.
    """

    def __init__(self, block: Block, split: Split) -> None:
        self.block = block
        self.first_id = split.first_id
        self.own_maxima = block.largest()
        self.maxima = usable_maxima(split.maxima(self.own_maxima))
        self.below, self.totals = split.totals(block.weigh(self.maxima))


class _GrowingSet:
    """The targets of one sampler, chunk by chunk.

    Args:
        sampler: of the set.
        positions: uint64[T] of all valid rows.
    """

    def __init__(self, sampler: Sampler, positions: Uint64Array) -> None:
        self._sampler = sampler
        self._draws = Draws(sampler.name, sampler.num_draws, sampler.seed, positions)
        self._parts: list[tuple[npt.NDArray[Any], ...]] = []
        self._maxima: list[Float32Array] = []
        self._totals: list[Int64Array] = []

    def add(self, chunk: _Chunk, rows: slice) -> None:
        """Sample a chunk, which holds these of the valid rows."""
        if self._sampler.kind == "logprobs":
            self._maxima.append(chunk.maxima)
            self._totals.append(chunk.totals)
            likeliest = chunk.block.likeliest(self._sampler.num_draws)
            ids = likeliest.columns + chunk.first_id
            self._parts.append((likeliest.lengths, ids, likeliest.logits, likeliest.weights))
            return
        drawn = chunk.block.drawn(self._draws, rows, chunk.below, chunk.totals)
        self._parts.append((drawn.lengths, drawn.columns + chunk.first_id, drawn.counts))

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return what the other ranks need of this one."""
        dtypes = (np.int32, np.int32, *self._value_dtypes)
        if not self._parts:
            return [np.empty(0, dtype) for dtype in dtypes]
        columns = map(np.concatenate, zip(*self._parts, strict=True))
        return [column.astype(dtype) for column, dtype in zip(columns, dtypes, strict=True)]

    @property
    def _value_dtypes(self) -> tuple[type, ...]:
        return (np.float32, np.int64) if self._sampler.kind == "logprobs" else (np.int32,)

    def targets(
        self, everyone: Sequence[Iterator[npt.NDArray[Any]]], rows: Int64Array, num_rows: int
    ) -> RaggedTargets:
        """Return all targets, where the valid rows are `rows` of `num_rows`.

        Take this set's arrays from every rank's.
        """
        width = 2 + len(self._value_dtypes)
        lengths, ids, values, *weights = _merged(
            [[next(arrays) for _ in range(width)] for arrays in everyone]
        )
        if weights and len(lengths):
            lengths, ids, values = self._chosen(lengths, ids, values, weights[0])
        entries = np.zeros(num_rows, np.int32)
        entries[rows] = lengths
        return RaggedTargets(
            kind=self._sampler.kind,
            num_draws=self._sampler.num_draws,
            entries_per_token=entries,
            ids=ids,
            values=values,
        )

    def _chosen(
        self,
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        logits: Float32Array,
        weights: Int64Array,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Float32Array]:
        """Return (entries, ids, natural-log probabilities) of the likeliest of the ranks' candidates."""
        # Candidates are the k likeliest of each rank's own ids: the k likeliest of all are among them.
        maxima, totals = np.concatenate(self._maxima), np.concatenate(self._totals)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        padded = np.full((len(lengths), int(lengths.max())), -np.inf, np.float32)
        padded[rows, columns] = logits
        chosen = likeliest(padded, self._sampler.num_draws)
        if self._sampler.top_p is not None:
            masses = np.zeros(padded.shape, np.int64)
            masses[rows, columns] = weights
            chosen &= _needed(padded, masses, _mass_of(self._sampler.top_p, totals))
        kept = chosen[rows, columns]
        shifted = logits[kept].astype(np.float64) - maxima[rows[kept]]
        logprobs = shifted - log_sums(totals)[rows[kept]]
        return chosen.sum(axis=1).astype(np.int32), ids[kept], logprobs.astype(np.float32)


class _Moments:
    """What `DistributionFigures` hear of some rows: entropy and likeliest id.

    With w the integer weights and z the logits, the entropy is log(W / 2**40) + sum w (max z - z) / W: each id adds
    -t log t with t = w / W, and -log t is log(W / 2**40) + (max z - z). The second sum is of terms of one sign.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]] = []
        self._totals: list[Int64Array] = []

    def add(self, chunk: _Chunk, rows: Int64Array) -> None:
        """Look at some rows of a chunk."""
        if not len(rows):
            return
        depths, columns = chunk.block.moments(rows)
        is_here = chunk.own_maxima[rows] == chunk.maxima[rows]
        ids = np.where(is_here, columns + chunk.first_id, MAX_VOCAB).astype(np.int32)
        self._parts.append((depths, ids))
        self._totals.append(chunk.totals[rows])

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return what the other ranks need of this one."""
        if not self._parts:
            return [np.empty(0), np.empty(0, np.int32)]
        return list(map(np.concatenate, zip(*self._parts, strict=True)))

    def report(
        self, everyone: Sequence[Iterator[npt.NDArray[Any]]], figures: DistributionFigures
    ) -> None:
        """Tell them; takes its arrays from every rank's."""
        if self._totals:
            totals = np.concatenate(self._totals)
            depths = np.sum([next(arrays) for arrays in everyone], axis=0)
            top_ids = np.min([next(arrays) for arrays in everyone], axis=0)
            figures.add(log_sums(totals) + depths / totals, top_ids)


def _merged(parts: list[list[npt.NDArray[Any]]]) -> list[npt.NDArray[Any]]:
    """Join rows (lengths, then columns of entries) of which every rank has a stretch, ranks by ascending ids."""
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([np.repeat(np.arange(len(lengths)), lengths) for lengths, *_ in parts])
    order = np.argsort(rows, kind="stable")
    lengths, *columns = zip(*parts, strict=True)
    totals = np.stack(lengths).sum(axis=0, dtype=np.int32)
    return [totals, *(np.concatenate(column)[order] for column in columns)]


def _needed(logits: Float32Array, weights: Int64Array, mass: Int64Array) -> npt.NDArray[np.bool_]:
    """Mark the fewest of the likeliest whose weights reach `mass`, or all, bool[T, C]; of equal logits the first first.

    The comparison is of integers, so it is exact and has one outcome in any order of summation.
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    masses = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    # An id is needed if those before it fall short.
    by_rank = np.ones(logits.shape, np.bool_)
    by_rank[:, 1:] = masses[:, :-1] < mass[:, None]
    needed = np.empty(logits.shape, np.bool_)
    np.put_along_axis(needed, order, by_rank, axis=1)
    return needed


def _mass_of(top_p: float, totals: Int64Array) -> Int64Array:
    """Return the least integer >= top_p * W, int64[T].

    top_p is cut to 64 binary places, which a double >= 2**-12 has.

    A sum of integer weights is at least top_p W if and only if it is at least this, so that no rounding decides which
    ids are kept.
    """
    share = np.uint64(int(top_p * 2.0**64))
    unsigned = totals.astype(np.uint64)
    has_fraction = unsigned * share != 0  # the product's lower 64 bits
    mass: Int64Array = umul64hi(unsigned, share).astype(np.int64) + has_fraction
    return mass
