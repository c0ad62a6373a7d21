"""Which parts of which documents share a sequence: best-fit decreasing, as in Ding et al. 2024 (arXiv 2404.10830).

Legend: D documents, L positions per sequence (seq_len), P parts of documents, S sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Parts of documents, sequence by sequence.

    Attributes:
        documents: int64[P], each part's document.
        offsets: int64[P], its first token there.
        lengths: int64[P], its tokens.
        starts: int64[S + 1], the first part of each sequence, and P.
    """

    documents: Int64s
    offsets: Int64s
    lengths: Int64s
    starts: Int64s


def best_fit(
    document_lengths: Int64s, order: Int64s, seq_len: int, shuffled: Callable[[int], Int64s]
) -> Packing:
    """Pack documents into sequences, cutting only those that are longer than one.

    Such a document fills whole sequences, and what is left of it is packed like a document. Parts are placed from the
    longest to the shortest, each into the sequence that it leaves the least room in. Within a sequence they stand in
    the order of the documents.

    Args:
        document_lengths: int64[D], tokens of each.
        order: int64[D], the order of the documents.
        seq_len: L.
        shuffled: gives an order of so many sequences, which would come from those of long documents to short ones.
    """
    lengths = document_lengths[order]
    whole, rest = np.divmod(lengths, seq_len)
    counts = whole + (rest > 0)
    places = np.repeat(np.arange(len(order)), counts)
    offsets = (np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    sizes = np.minimum(lengths[places] - offsets, seq_len)
    bins = _bins(sizes, seq_len)
    num_bins = int(bins.max()) + 1
    rank = np.empty(num_bins, np.int64)
    rank[shuffled(num_bins)] = np.arange(num_bins)
    bins = rank[bins]
    by_bin = np.argsort(bins, kind="stable")
    starts = np.searchsorted(bins[by_bin], np.arange(num_bins + 1))
    return Packing(
        documents=order[places[by_bin]],
        offsets=offsets[by_bin],
        lengths=sizes[by_bin],
        starts=starts.astype(np.int64),
    )


def _bins(sizes: Int64s, capacity: int) -> Int64s:
    """Find the bin of each part, int64[P], by best-fit decreasing; equal ones of 1 to `capacity` tokens in order.

    Parts of one size are placed together, and so are bins of one room: a bin with room r is the best one for r // size
    parts of a size, one after the other. A bin's room falls below half by that, so there are O(log L) such moves for
    each size, not one for each part.
    """
    by_size = np.argsort(-sizes, kind="stable")
    sorted_sizes = sizes[by_size]
    found = np.empty(len(sizes), np.int64)
    borders = np.flatnonzero(np.diff(sorted_sizes)) + 1
    rooms = _Rooms()
    num_bins = 0
    for first, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(sizes)], strict=True):
        size = int(sorted_sizes[first])
        while first < stop:
            room = rooms.least(size)
            each = (capacity if room is None else room) // size
            wanted = -(-(stop - first) // each)
            if room is None:
                room, some = capacity, np.arange(num_bins, num_bins + wanted)
                num_bins += wanted
            else:
                some = rooms.take(room, wanted)
            parts = by_size[first : first + len(some) * each]
            parts = parts[: stop - first]
            found[parts] = np.repeat(some, each)[: len(parts)]
            last = len(parts) - (len(some) - 1) * each
            rooms.put(room - each * size, some[:-1])
            rooms.put(room - last * size, some[-1:])
            first += len(parts)
    return found


class _Rooms:
    """Bins by the room that is left in them."""

    def __init__(self) -> None:
        self._bins: dict[int, list[Int64s]] = {}
        self._rooms: list[int] = []

    def least(self, size: int) -> int | None:
        """Return the least room that a size fits into."""
        place = bisect_left(self._rooms, size)
        return self._rooms[place] if place < len(self._rooms) else None

    def put(self, room: int, bins: Int64s) -> None:
        """Say that bins have this room."""
        if room == 0 or not len(bins):
            return
        if room not in self._bins:
            self._bins[room] = []
            insort(self._rooms, room)
        self._bins[room].append(bins)

    def take(self, room: int, count: int) -> Int64s:
        """Take so many bins of a room away, or all where there are fewer."""
        bins = np.concatenate(self._bins.pop(room))
        self._rooms.remove(room)
        self.put(room, bins[count:])
        return bins[:count]
