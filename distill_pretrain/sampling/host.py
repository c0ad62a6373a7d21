"""The numpy samplers: what they read from this rank's columns of some rows, in the memory of the host.

Legend: T positions, V columns, N draws, E entries in all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import DrawnEntries, LikeliestEntries, RowMoments
from distill_pretrain.sampling.columns import Draws
from distill_pretrain.sampling.philox import Uint64Array, umul64hi
from distill_pretrain.sampling.weights import Scratch, integer_weights, largest

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
PointsOf = Callable[[Uint64Array, Int64Array, int], Int64Array]


def host_columns(logits: torch.Tensor) -> HostColumns:
    """Columns [T, V] of any float type and device, moved to the host."""
    return HostColumns(logits.detach().cpu().float().numpy())


class HostColumns:
    """A `Columns`.

    Args:
        logits: float32[T, V]; no column counts as one of -inf.
    """

    rows_at_once = None

    def __init__(self, logits: Float32Array) -> None:
        assert logits.ndim == 2 and logits.dtype == np.float32, (logits.shape, logits.dtype)
        if logits.shape[1] == 0:
            logits = np.full((len(logits), 1), -np.inf, np.float32)
        self._logits = logits
        self.num_rows, self.width = logits.shape
        self._scratch: Scratch | None = None

    def block(self, rows: Int64Array) -> HostBlock:
        """Some rows; of the blocks taken, one at a time may be used, and the first has the most rows."""
        if self._scratch is None:
            self._scratch = Scratch(len(rows), self.width)
        return HostBlock(_rows(self._logits, rows), self._scratch)


class HostBlock:
    """A `Block`.

    Args:
        logits: float32[T, V].
        scratch: holds the running sums of the weights, so one block at a time may use it.
    """

    def __init__(self, logits: Float32Array, scratch: Scratch) -> None:
        self._logits = logits
        self._scratch = scratch

    def largest(self) -> Float32Array:
        """float32[T]."""
        return largest(self._logits)

    def weigh(self, maxima: Float32Array) -> Int64Array:
        """int64[T]."""
        self._maxima = maxima
        self._cumulative = integer_weights(self._logits, self._scratch, maxima)
        np.cumsum(self._cumulative, axis=1, out=self._cumulative)
        totals: Int64Array = self._cumulative[:, -1].copy()
        return totals

    def drawn(
        self, draws: Draws, rows: slice, below: Int64Array, totals: Int64Array
    ) -> DrawnEntries:
        """Entries of this rank."""
        points = POINTS[draws.name](draws.words[rows], totals, draws.num_draws)
        return _run_lengths(_locate(self._cumulative, points - below[:, None]), self._width)

    def likeliest(self, k: int) -> LikeliestEntries:
        """Candidates of this rank."""
        chosen = likeliest(self._logits, k)
        rows, columns = np.nonzero(chosen)
        before = np.where(columns > 0, self._cumulative[rows, columns - 1], 0)
        weights = self._cumulative[rows, columns] - before
        return LikeliestEntries(chosen.sum(axis=1), columns, self._logits[rows, columns], weights)

    def moments(self, rows: Int64Array) -> RowMoments:
        """Of some rows."""
        logits = self._logits[rows]
        weights = np.diff(self._cumulative[rows], axis=1, prepend=np.int64(0))
        depth = np.where(weights > 0, self._maxima[rows, None] - logits, 0)
        depths = np.einsum("tv,tv->t", weights.astype(np.float64), depth)
        return RowMoments(depths, logits.argmax(axis=1))

    @property
    def _width(self) -> int:
        width: int = self._logits.shape[1]
        return width


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


POINTS: dict[str, PointsOf] = {
    "multinomial": multinomial_points,
    "systematic": systematic_points,
}


def _rows(logits: Float32Array, rows: Int64Array) -> Float32Array:
    """The chosen rows; a view when they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return logits[first : last + 1] if last - first + 1 == len(rows) else logits[rows]


def _locate(cumulative: Int64Array, points: Int64Array) -> Int64Array:
    """int64[T, N] columns, ascending in a row: whose weight interval holds the point; V for a point beyond them."""
    found: Int64Array = torch.searchsorted(
        torch.from_numpy(cumulative), torch.from_numpy(points), right=True
    ).numpy()
    found[points < 0] = cumulative.shape[1]
    found.sort(axis=1)
    return found


def _run_lengths(drawn: Int64Array, vocab: int) -> DrawnEntries:
    """Of ascending draws [T, N], those below `vocab`."""
    starts_run = np.ones(drawn.shape, np.bool_)
    np.not_equal(drawn[:, 1:], drawn[:, :-1], out=starts_run[:, 1:])
    starts = np.flatnonzero(starts_run)
    counts = np.diff(starts, append=drawn.size)
    columns = drawn.reshape(-1)[starts]
    own = columns < vocab
    return DrawnEntries((starts_run & (drawn < vocab)).sum(axis=1), columns[own], counts[own])


def likeliest(logits: Float32Array, k: int) -> npt.NDArray[np.bool_]:
    """bool[T, V]: the k largest logits, ties to the lower id; -inf is never among them."""
    vocab = logits.shape[1]
    k = min(k, vocab)
    threshold = np.partition(logits, vocab - k, axis=1)[:, vocab - k, None]
    above = logits > threshold
    tied = (logits == threshold) & (logits > -np.inf)
    room = k - above.sum(axis=1, keepdims=True)
    chosen: npt.NDArray[np.bool_] = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return chosen
