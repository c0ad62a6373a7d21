"""The tables of a Megatron .idx, mapped into memory: the ranks of a node share its pages.

Legend: D documents, S stored sequences (a document is one or more of them, contiguous in the .bin).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import TokenDataError

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
INTEGER_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 20
_REBUILD = "tokenise the corpus again, or copy both files again"


def damaged(path: Path, what: str, found: object, expected: object) -> TokenDataError:
    """Return the error of a .bin or .idx that is not what it must be."""
    return TokenDataError(what, where=path, found=found, expected=expected, remedy=_REBUILD)


class IndexTables:
    """PREFIX.idx, of which opening reads the header and a few places.

    Attributes:
        path: the file.
        dtype: stored integer type of a token.
        num_sequences: S.
        num_documents: D.
        num_tokens: tokens in all documents.
        lengths: int32[S], tokens of each stored sequence, mapped.
        pointers: int64[S], its first byte in the .bin, mapped.
        bounds: int64[D + 1], the first stored sequence of each document, and S, mapped.
    """

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            TokenDataError: it is no index, or its length is not what its header says.
        """
        self.path = path
        idx_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(IDX_HEADER.size)
        if len(head) < IDX_HEADER.size:
            expected = f"at least {IDX_HEADER.size} bytes"
            raise damaged(path, "the index is truncated", f"{len(head)} bytes", expected)
        magic, version, code, num_sequences, num_bounds = IDX_HEADER.unpack(head)
        if magic != IDX_MAGIC or version != 1:
            found = f"{magic!r} version {version}"
            raise damaged(path, "not a Megatron index", found, f"{IDX_MAGIC!r} version 1")
        if code not in INTEGER_DTYPES:
            what = "the index names no integer token type"
            raise damaged(path, what, f"code {code}", f"one of {sorted(INTEGER_DTYPES)}")
        expected_bytes = IDX_HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
        # A multimodal index adds one mode byte per sequence; the tokens are laid out the same.
        if idx_bytes not in (expected_bytes, expected_bytes + num_sequences):
            what = "the index has the wrong length"
            raise damaged(path, what, f"{idx_bytes} bytes", f"{expected_bytes} bytes")
        whole = np.memmap(path, np.uint8, "r")
        first = IDX_HEADER.size
        self.lengths = np.frombuffer(whole, "<i4", num_sequences, first)
        self.pointers = np.frombuffer(whole, "<i8", num_sequences, first + 4 * num_sequences)
        self.bounds = np.frombuffer(whole, "<i8", num_bounds, first + 12 * num_sequences)
        self.dtype = np.dtype(INTEGER_DTYPES[code])
        self.num_sequences = num_sequences
        self.num_documents = max(0, num_bounds - 1)
        # A table that contradicts itself is found by `check`.
        self.num_tokens = 0
        if num_sequences:
            self.num_tokens = int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def check(self) -> None:
        """Read the tables, a part at a time, and raise TokenDataError where they contradict each other."""
        total = 0
        for first in range(0, self.num_sequences, _CHUNK):
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            pointers = self.pointers[first : first + _CHUNK]
            if int(lengths.min()) < 0:
                what = "the index holds a negative sequence length"
                raise damaged(self.path, what, int(lengths.min()), "lengths >= 0")
            expected = (total + np.cumsum(lengths) - lengths) * self.dtype.itemsize
            if not np.array_equal(pointers, expected):
                at = int(np.flatnonzero(pointers != expected)[0])
                what = f"the byte offset of sequence {first + at} contradicts the lengths before it"
                raise damaged(self.path, what, int(pointers[at]), int(expected[at]))
            total += int(lengths.sum())
        bounds = self.bounds
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.num_sequences:
            found = "none" if len(bounds) == 0 else f"{int(bounds[0])} to {int(bounds[-1])}"
            what = "document boundaries are wrong"
            raise damaged(self.path, what, found, f"0 to {self.num_sequences}")
        for first in range(0, self.num_documents, _CHUNK):
            if np.any(np.diff(bounds[first : first + _CHUNK + 1]) < 0):
                what = "document boundaries are wrong"
                raise damaged(self.path, what, "a decreasing pair", "ascending")

    def start_of(self, document: int) -> int:
        """Return the number of a document's first token in the .bin; that of document D is the number of tokens."""
        sequence = int(self.bounds[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def lengths_between(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens of the documents from `first` up to `stop`, int64[stop - first]."""
        bounds = self.bounds[first : stop + 1]
        starts = np.full(len(bounds), self.num_tokens, np.int64)
        inside = bounds < self.num_sequences
        starts[inside] = self.pointers[bounds[inside]] // self.dtype.itemsize
        return np.diff(starts)
