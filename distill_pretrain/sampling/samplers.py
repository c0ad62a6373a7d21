"""Sparse targets from teacher logits: `systematic`, `multinomial`, `topk` and `topp`.

Legend: T positions, V vocabulary, N draws (the k of top-k, the cap of top-p), E entries in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.sampling.philox import Uint64Array, draws64, umul64hi
from distill_pretrain.sampling.weights import BadLogits, Scratch, integer_weights, row_maxima

SAMPLERS = ("systematic", "multinomial", "topk", "topp")
MAX_VOCAB = 1 << 20
_MULTINOMIAL_STREAM = 0
_SYSTEMATIC_STREAM = 1
# The int64 cumulative weights of a chunk of rows should stay in a 1 MiB L2 cache.
_CHUNK_ELEMENTS = 65536

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Rows = tuple[Int64Array, Int64Array, npt.NDArray[Any]]
PointsOf = Callable[[Uint64Array, Int64Array, int], Int64Array]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a row of logits becomes a row of targets.

    Attributes:
        name: one of SAMPLERS.
        num_draws: N >= 1; for "topk" the k, for "topp" the most entries of a row.
        seed: key of the draws, in [0, 2**64); unused by "topk" and "topp".
        top_p: mass at which "topp" stops, 0 < top_p < 1; None for the others.
    """

    name: str
    num_draws: int
    seed: int
    top_p: float | None = None

    def __post_init__(self) -> None:
        assert self.name in SAMPLERS, self.name
        assert self.num_draws >= 1 and 0 <= self.seed < 1 << 64, (self.num_draws, self.seed)
        assert (self.top_p is not None) == (self.name == "topp"), (self.name, self.top_p)
        assert self.top_p is None or 0 < self.top_p < 1, self.top_p

    @property
    def kind(self) -> TargetKind:
        """What an entry's value is."""
        return "logprobs" if self.name in ("topk", "topp") else "counts"


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
    """Sparse targets of one sampler, whose attributes are given one by one; see `sample_sets`."""
    chosen = Sampler(name=sampler, num_draws=num_draws, seed=seed, top_p=top_p)
    return sample_sets(logits, positions, [chosen], valid=valid)[0]


def sample_sets(
    logits: Float32Array,
    positions: Uint64Array,
    samplers: Sequence[Sampler],
    *,
    valid: npt.NDArray[np.bool_] | None = None,
) -> list[RaggedTargets]:
    """Sparse targets of T positions by each of several samplers, which share the softmax.

    A row depends on its own logits and position and on its sampler only, not on the other samplers.

    Args:
        logits: float32[T, V], V <= 2**20; -inf excludes a token.
        positions: uint64[T], the sequence plan's sequence * seq_len + offset.
        samplers: one or more.
        valid: bool[T]; a row where it is False is not looked at and gets no entry.

    Returns:
        Targets of each sampler, in the order given.

    Raises:
        BadLogits: rows (numbered in `logits`) hold NaN, +inf or nothing but -inf.
    """
    assert logits.ndim == 2 and logits.dtype == np.float32, (logits.shape, logits.dtype)
    assert positions.shape == logits.shape[:1] and 1 <= logits.shape[1] <= MAX_VOCAB
    positions = positions.astype(np.uint64)
    rows = np.arange(len(logits)) if valid is None else np.flatnonzero(valid)
    sets = [_GrowingSet(sampler, positions[rows]) for sampler in samplers]
    per_chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    scratch = Scratch(min(per_chunk, max(1, len(rows))), logits.shape[1])
    bad: list[int] = []
    for start in range(0, len(rows), per_chunk):
        numbers = rows[start : start + per_chunk]
        try:
            chunk = _Chunk(_rows(logits, numbers), scratch)
            for grown in sets:
                grown.add(chunk, slice(start, start + per_chunk))
        except BadLogits as error:
            bad.extend(int(numbers[row]) for row in error.rows)
    if bad:
        raise BadLogits(bad)
    return [grown.targets(rows, len(logits)) for grown in sets]


class _Chunk:
    """Some rows of logits, and what several samplers read from them.

    Args:
        logits: float32[T, V].
        scratch: holds `cumulative`, so one chunk at a time may use it.

    Attributes:
        maxima: float32[T].

    Raises:
        BadLogits: see `row_maxima`.
    """

    def __init__(self, logits: Float32Array, scratch: Scratch) -> None:
        self.logits = logits
        self.maxima = row_maxima(logits)
        self._scratch = scratch

    @cached_property
    def cumulative(self) -> Int64Array:
        """int64[T, V]: running sums of the integer weights."""
        cumulative = integer_weights(self.logits, self._scratch, self.maxima)
        np.cumsum(cumulative, axis=1, out=cumulative)
        return cumulative

    @property
    def totals(self) -> Int64Array:
        """int64[T]: W."""
        return self.cumulative[:, -1]

    def weights(self, rows: Int64Array, ids: Int64Array) -> Int64Array:
        """int64[E]: integer weights of some entries."""
        below = np.where(ids > 0, self.cumulative[rows, ids - 1], 0)
        weights: Int64Array = self.cumulative[rows, ids] - below
        return weights

    @cached_property
    def _log_totals(self) -> npt.NDArray[np.float64]:
        shifted = self.logits.astype(np.float64) - self.maxima[:, None]
        totals: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1))
        return totals

    def logprobs(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        """float32[E]: natural-log probabilities of some entries; a float64 log-softmax, rounded once."""
        shifted = self.logits[rows, ids].astype(np.float64) - self.maxima[rows]
        rounded: Float32Array = (shifted - self._log_totals[rows]).astype(np.float32)
        return rounded


class _GrowingSet:
    """The targets of one sampler, chunk by chunk.

    Args:
        sampler: of the set.
        positions: uint64[valid rows].
    """

    def __init__(self, sampler: Sampler, positions: Uint64Array) -> None:
        self._sampler = sampler
        self._draws = _draws(sampler, positions)
        self._parts: list[Rows] = []

    def add(self, chunk: _Chunk, rows: slice) -> None:
        """Sample a chunk, which holds these of the valid rows."""
        sampler = self._sampler
        if sampler.name == "topk":
            part = _with_logprobs(chunk, _likeliest(chunk, sampler.num_draws))
        elif sampler.name == "topp":
            assert sampler.top_p is not None
            part = _with_logprobs(chunk, _nucleus(chunk, sampler.num_draws, sampler.top_p))
        else:
            points = _POINTS[sampler.name](self._draws[rows], chunk.totals, sampler.num_draws)
            part = _run_lengths(_locate(chunk.cumulative, points))
        self._parts.append(part)

    def targets(self, rows: Int64Array, num_rows: int) -> RaggedTargets:
        """All of them, where the valid rows are `rows` of `num_rows`."""
        kind = self._sampler.kind
        dtype = np.float32 if kind == "logprobs" else np.int32
        entries = np.zeros(num_rows, np.int32)
        ids, values = np.empty(0, np.int32), np.empty(0, dtype)
        if self._parts:
            lengths, all_ids, all_values = map(np.concatenate, zip(*self._parts, strict=True))
            entries[rows] = lengths
            ids, values = all_ids.astype(np.int32), all_values.astype(dtype)
        return RaggedTargets(
            kind=kind,
            num_draws=self._sampler.num_draws,
            entries_per_token=entries,
            ids=ids,
            values=values,
        )


def multinomial_points(draws: Uint64Array, totals: Int64Array, num_draws: int) -> Int64Array:
    """int64[T, N]: independent points r = floor(x * W / 2**64) in [0, W).

    Args:
        draws: uint64[T, N], x, uniform.
        totals: int64[T], W.
        num_draws: N.
    """
    assert draws.shape == (len(totals), num_draws), draws.shape
    return umul64hi(draws, totals.astype(np.uint64)[:, None]).astype(np.int64)


def systematic_points(draws: Uint64Array, totals: Int64Array, num_draws: int) -> Int64Array:
    """int64[T, N] ascending: r_k = floor((k * W + h) / N), one h in [0, W) per position.

    Over all (k, h) the number k * W + h takes every value in [0, N * W) once, so floor(. / N) hits
    every integer of [0, W) exactly N times: E[count_i] = N * w_i / W with no rounding. For one h,
    count_i is the number of multiples of W in a half-open interval of length N * w_i: the floor or
    the ceiling of N * w_i / W. (h itself is floor(u * W / 2**64): P(h < a) is within 2**-64.)

    k * W + h can exceed 64 bits; with W = q * N + rem it is k * q + floor((k * rem + h) / N).

    Args:
        draws: uint64[T, 1], u, uniform.
        totals: int64[T], W < 2**62.
        num_draws: N <= 2**16.
    """
    h = umul64hi(draws, totals.astype(np.uint64)[:, None]).astype(np.int64)
    quotient, remainder = np.divmod(totals[:, None], num_draws)
    k = np.arange(num_draws, dtype=np.int64)
    points: Int64Array = k * quotient + (k * remainder + h) // num_draws
    return points


_POINTS: dict[str, PointsOf] = {
    "multinomial": multinomial_points,
    "systematic": systematic_points,
}


def _draws(sampler: Sampler, positions: Uint64Array) -> Uint64Array:
    """All random words a call needs, made at once: Philox in numpy pays per call, not per word."""
    if sampler.name == "multinomial":
        return draws64(sampler.seed, _MULTINOMIAL_STREAM, positions, sampler.num_draws)
    if sampler.name == "systematic":
        return draws64(sampler.seed, _SYSTEMATIC_STREAM, positions, 1)
    return np.empty((len(positions), 0), np.uint64)


def _rows(logits: Float32Array, rows: Int64Array) -> Float32Array:
    """The chosen rows; a view when they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return logits[first : last + 1] if last - first + 1 == len(rows) else logits[rows]


def _locate(cumulative: Int64Array, points: Int64Array) -> Int64Array:
    """int64[T, N] token ids, ascending in a row: the id whose weight interval holds the point."""
    found: Int64Array = torch.searchsorted(
        torch.from_numpy(cumulative), torch.from_numpy(points), right=True
    ).numpy()
    found.sort(axis=1)
    return found


def _run_lengths(drawn: Int64Array) -> Rows:
    """(entries int64[T], ids int64[E], counts int64[E]) of ascending draws [T, N]."""
    starts_run = np.ones(drawn.shape, np.bool_)
    np.not_equal(drawn[:, 1:], drawn[:, :-1], out=starts_run[:, 1:])
    starts = np.flatnonzero(starts_run)
    counts = np.diff(starts, append=drawn.size)
    return starts_run.sum(axis=1), drawn.reshape(-1)[starts], counts


def _likeliest(chunk: _Chunk, k: int) -> npt.NDArray[np.bool_]:
    """bool[T, V]: the k largest logits, ties to the lower id; -inf is never among them."""
    logits = chunk.logits
    vocab = logits.shape[1]
    k = min(k, vocab)
    threshold = np.partition(logits, vocab - k, axis=1)[:, vocab - k, None]
    above = logits > threshold
    tied = (logits == threshold) & (logits > -np.inf)
    room = k - above.sum(axis=1, keepdims=True)
    chosen: npt.NDArray[np.bool_] = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return chosen


def _nucleus(chunk: _Chunk, cap: int, top_p: float) -> npt.NDArray[np.bool_]:
    """bool[T, V]: the fewest of the likeliest ids whose mass reaches `top_p`, or `cap` of them if that is less.

    Masses are sums of integer weights, so the comparison `mass >= top_p` is exact and has one outcome in any order
    of summation. Of equal logits the lower id comes first.
    """
    chosen = _likeliest(chunk, cap)
    rows, ids = np.nonzero(chosen)
    lengths = chosen.sum(axis=1)
    columns = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    padded = (len(lengths), int(lengths.max()))
    logits = np.full(padded, -np.inf, np.float32)
    weights = np.zeros(padded, np.int64)
    logits[rows, columns] = chunk.logits[rows, ids]
    weights[rows, columns] = chunk.weights(rows, ids)
    order = np.argsort(-logits, axis=1, kind="stable")
    masses = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    # An id is needed if those before it fall short.
    needed_by_rank = np.ones(padded, np.bool_)
    needed_by_rank[:, 1:] = masses[:, :-1] < _mass_of(top_p, chunk.totals)[:, None]
    needed = np.empty(padded, np.bool_)
    np.put_along_axis(needed, order, needed_by_rank, axis=1)
    chosen[rows, ids] = needed[rows, columns]
    return chosen


def _mass_of(top_p: float, totals: Int64Array) -> Int64Array:
    """int64[T]: the least integer >= top_p * W (top_p cut to 64 binary places, which a double >= 2**-12 has)."""
    share = np.uint64(int(top_p * 2.0**64))
    unsigned = totals.astype(np.uint64)
    has_fraction = unsigned * share != 0  # the product's lower 64 bits
    mass: Int64Array = umul64hi(unsigned, share).astype(np.int64) + has_fraction
    return mass


def _with_logprobs(chunk: _Chunk, chosen: npt.NDArray[np.bool_]) -> Rows:
    """(entries int64[T], ids int64[E], natural-log probabilities float32[E]) of the chosen."""
    rows, ids = np.nonzero(chosen)
    return chosen.sum(axis=1), ids, chunk.logprobs(rows, ids)
