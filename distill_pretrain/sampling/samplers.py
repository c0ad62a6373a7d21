"""Sparse targets from teacher logits: `systematic`, `multinomial` and `topk`.

Legend: T positions, V vocabulary, N draws (or the k of top-k), E entries in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.sampling.philox import Uint64Array, draws64, umul64hi
from distill_pretrain.sampling.weights import BadLogits, Scratch, integer_weights, row_maxima

SAMPLERS = ("systematic", "multinomial", "topk")
MAX_VOCAB = 1 << 20
_MULTINOMIAL_STREAM = 0
_SYSTEMATIC_STREAM = 1
# The int64 cumulative weights of a chunk of rows should stay in a 1 MiB L2 cache.
_CHUNK_ELEMENTS = 65536

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Rows = tuple[Int64Array, Int64Array, npt.NDArray[Any]]
PointsOf = Callable[[Uint64Array, Int64Array, int], Int64Array]


def sample_targets(
    logits: Float32Array,
    positions: Uint64Array,
    *,
    sampler: str,
    num_draws: int,
    seed: int,
    valid: npt.NDArray[np.bool_] | None = None,
) -> RaggedTargets:
    """Sparse targets of T positions; each row depends on its own logits and position only.

    Args:
        logits: float32[T, V], V <= 2**20; -inf excludes a token.
        positions: uint64[T], the sequence plan's sequence * seq_len + offset.
        sampler: "systematic", "multinomial" or "topk".
        num_draws: N >= 1; for "topk" the k.
        seed: key of the draws, in [0, 2**64); unused by "topk".
        valid: bool[T]; a row where it is False is not looked at and gets no entry.

    Returns:
        Targets of kind "counts", or "logprobs" for "topk".

    Raises:
        BadLogits: rows (numbered in `logits`) hold NaN, +inf or nothing but -inf.
    """
    assert sampler in SAMPLERS, sampler
    assert logits.ndim == 2 and logits.dtype == np.float32, (logits.shape, logits.dtype)
    assert positions.shape == logits.shape[:1] and 1 <= logits.shape[1] <= MAX_VOCAB
    assert num_draws >= 1 and 0 <= seed < 1 << 64, (num_draws, seed)
    positions = positions.astype(np.uint64)
    rows = np.arange(len(logits)) if valid is None else np.flatnonzero(valid)
    draws = _draws(sampler, seed, positions[rows], num_draws)
    per_chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    scratch = Scratch(min(per_chunk, max(1, len(rows))), logits.shape[1])
    bad: list[int] = []
    lengths: list[npt.NDArray[Any]] = []
    ids: list[npt.NDArray[Any]] = []
    values: list[npt.NDArray[Any]] = []
    for start in range(0, len(rows), per_chunk):
        chunk = rows[start : start + per_chunk]
        try:
            if sampler == "topk":
                found = _top_k(_rows(logits, chunk), num_draws)
            else:
                cumulative = integer_weights(_rows(logits, chunk), scratch)
                np.cumsum(cumulative, axis=1, out=cumulative)
                totals = cumulative[:, -1]
                points = _POINTS[sampler](draws[start : start + per_chunk], totals, num_draws)
                found = _run_lengths(_locate(cumulative, points))
        except BadLogits as error:
            bad.extend(int(chunk[row]) for row in error.rows)
            continue
        for part, whole in zip(found, (lengths, ids, values), strict=True):
            whole.append(part)
    if bad:
        raise BadLogits(bad)
    entries = np.zeros(len(logits), np.int32)
    if lengths:
        entries[rows] = np.concatenate(lengths)
    value_dtype = np.float32 if sampler == "topk" else np.int32
    return RaggedTargets(
        kind="logprobs" if sampler == "topk" else "counts",
        num_draws=num_draws,
        entries_per_token=entries,
        ids=np.concatenate(ids).astype(np.int32) if ids else np.empty(0, np.int32),
        values=np.concatenate(values).astype(value_dtype) if values else np.empty(0, value_dtype),
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


def _draws(sampler: str, seed: int, positions: Uint64Array, num_draws: int) -> Uint64Array:
    """All random words a call needs, made at once: Philox in numpy pays per call, not per word."""
    if sampler == "multinomial":
        return draws64(seed, _MULTINOMIAL_STREAM, positions, num_draws)
    if sampler == "systematic":
        return draws64(seed, _SYSTEMATIC_STREAM, positions, 1)
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


def _top_k(logits: Float32Array, k: int) -> Rows:
    """(entries int64[T], ids int64[E], natural-log probabilities float32[E]).

    The k largest logits, ties to the lower id; -inf is never an entry. The log-softmax is taken in
    float64 and rounded once.
    """
    maxima = row_maxima(logits)
    vocab = logits.shape[1]
    k = min(k, vocab)
    threshold = np.partition(logits, vocab - k, axis=1)[:, vocab - k, None]
    above = logits > threshold
    tied = (logits == threshold) & (logits > -np.inf)
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (tied & (np.cumsum(tied, axis=1) <= room))
    rows, ids = np.nonzero(chosen)
    shifted = logits.astype(np.float64) - maxima[:, None]
    log_total = np.log(np.exp(shifted).sum(axis=1))
    logprobs = shifted[rows, ids] - log_total[rows]
    return chosen.sum(axis=1), ids, logprobs.astype(np.float32)
