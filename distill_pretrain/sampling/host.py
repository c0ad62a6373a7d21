"""The numpy samplers: what they read from this rank's columns of some rows, in the memory of the host.

Legend: T positions, V columns, N draws, E entries in all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from distill_pretrain.contracts import DrawnEntries, LikeliestEntries, RowMoments
from distill_pretrain.sampling.columns import Draws
from distill_pretrain.sampling.drawing import DRAWN
from distill_pretrain.sampling.weights import Scratch, integer_weights, largest

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def host_columns(logits: torch.Tensor) -> HostColumns:
    """Move columns [T, V] of any float type and device to the host."""
    return HostColumns(logits.detach().cpu().float().numpy())


class HostColumns:
    """The columns of a rank in the memory of the host: a `columns.Columns`.

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
        """Take some rows; of the blocks taken, one at a time may be used, and the first has the most rows."""
        if self._scratch is None:
            self._scratch = Scratch(len(rows), self.width)
        return HostBlock(_rows(self._logits, rows), self._scratch)


class HostBlock:
    """Some rows of a rank in the memory of the host: a `columns.Block`.

    Args:
        logits: float32[T, V].
        scratch: holds the running sums of the weights, so one block at a time may use it.
    """

    def __init__(self, logits: Float32Array, scratch: Scratch) -> None:
        self._logits = logits
        self._scratch = scratch

    def largest(self) -> Float32Array:
        """Return the largest logit of each row, float32[T]."""
        return largest(self._logits)

    def weigh(self, maxima: Float32Array) -> Int64Array:
        """Sum the integer weights of each row, int64[T]; see `columns.Block`."""
        self._maxima = maxima
        self._cumulative = integer_weights(self._logits, self._scratch, maxima)
        np.cumsum(self._cumulative, axis=1, out=self._cumulative)
        totals: Int64Array = self._cumulative[:, -1].copy()
        return totals

    def drawn(
        self, draws: Draws, rows: slice, below: Int64Array, totals: Int64Array
    ) -> DrawnEntries:
        """Find the entries of this rank's columns on which draws fall; see `columns.Block`."""
        points = DRAWN[draws.name].points(draws.words[rows], totals, draws.num_draws)
        return _run_lengths(_locate(self._cumulative, points - below[:, None]), self._width)

    def likeliest(self, k: int) -> LikeliestEntries:
        """Find the candidates of this rank's columns; see `columns.Block`."""
        chosen = likeliest(self._logits, k)
        rows, columns = np.nonzero(chosen)
        before = np.where(columns > 0, self._cumulative[rows, columns - 1], 0)
        weights = self._cumulative[rows, columns] - before
        return LikeliestEntries(chosen.sum(axis=1), columns, self._logits[rows, columns], weights)

    def moments(self, rows: Int64Array) -> RowMoments:
        """Compute the moments of some rows; see `columns.Block`."""
        logits = self._logits[rows]
        weights = np.diff(self._cumulative[rows], axis=1, prepend=np.int64(0))
        depth = np.where(weights > 0, self._maxima[rows, None] - logits, 0)
        depths = np.einsum("tv,tv->t", weights.astype(np.float64), depth)
        return RowMoments(depths, logits.argmax(axis=1))

    @property
    def _width(self) -> int:
        width: int = self._logits.shape[1]
        return width


def _rows(logits: Float32Array, rows: Int64Array) -> Float32Array:
    """The chosen rows; a view when they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return logits[first : last + 1] if last - first + 1 == len(rows) else logits[rows]


def _locate(cumulative: Int64Array, points: Int64Array) -> Int64Array:
    """Find whose weight interval holds each point: columns int64[T, N], ascending in a row.

    V for a point beyond them.
    """
    found: Int64Array = torch.searchsorted(
        torch.from_numpy(cumulative), torch.from_numpy(points), right=True
    ).numpy()
    found[points < 0] = cumulative.shape[1]
    found.sort(axis=1)
    return found


def _run_lengths(drawn: Int64Array, vocab: int) -> DrawnEntries:
    """Count how often each id below `vocab` occurs among ascending draws [T, N].

    Equal draws lie side by side, so an id is where a run begins and its count is how long the run is.
    """
    starts_run = np.ones(drawn.shape, np.bool_)
    np.not_equal(drawn[:, 1:], drawn[:, :-1], out=starts_run[:, 1:])
    starts = np.flatnonzero(starts_run)
    counts = np.diff(starts, append=drawn.size)
    columns = drawn.reshape(-1)[starts]
    own = columns < vocab
    return DrawnEntries((starts_run & (drawn < vocab)).sum(axis=1), columns[own], counts[own])


def likeliest(logits: Float32Array, k: int) -> npt.NDArray[np.bool_]:
    """Mark the k largest logits of each row, bool[T, V], ties to the lower id; -inf is never among them."""
    vocab = logits.shape[1]
    k = min(k, vocab)
    threshold = np.partition(logits, vocab - k, axis=1)[:, vocab - k, None]
    above = logits > threshold
    tied = (logits == threshold) & (logits > -np.inf)
    room = k - above.sum(axis=1, keepdims=True)
    chosen: npt.NDArray[np.bool_] = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return chosen
