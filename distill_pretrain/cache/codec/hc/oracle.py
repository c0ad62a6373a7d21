"""The entropy codec as FORMAT.md says it, bit by bit: the tests' measure of the fast coder.

It also runs where DISTILL_PRETRAIN_SLOW_CODER=1 asks for it and no fast one was built. A few thousand positions per
second. Legend: T positions of the block, E entries in all.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.errors import CacheCorrupt

TOO_MANY_ENTRIES = "more entries at a position than min(N, V)"
RANK_TOO_LARGE = "a rank outside the vocabulary"
COUNT_TOO_LARGE = "counts of a position that exceed N"
WRONG_ENTRIES = "another number of entries than the frame says"
WRONG_LENGTH = "a payload that is longer or shorter than its contents"
PADDING = "padding bits that are not zero"

_LENGTH_CONTEXT, _GAP_CONTEXTS, _VALUE_CONTEXTS = 0, 1, 111

_HEAD = struct.Struct("<II")

Arrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]


class Oracle:
    """The coder in plain Python; `NativeCoder` has the same methods."""

    def encode(
        self,
        tables: HcTables,
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        codes: npt.NDArray[np.int32],
    ) -> bytes:
        """Encode rows: lengths int32[T], ids int32[E], counts or log-probability codes int32[E]."""
        half = -(-len(lengths) // 2)
        entries = zip(ids.tolist(), codes.tolist(), strict=True)
        streams = []
        for part in (lengths[:half], lengths[half:]):
            writer = _Writer(tables)
            for length in part.tolist():
                row = [next(entries) for _ in range(length)]
                _encode_row(writer, sorted((int(tables.ranks_by_id[i]), code) for i, code in row))
            streams.append(writer.payload())
        return _HEAD.pack(len(streams[0]), int(lengths[:half].sum())) + b"".join(streams)

    def decode(
        self, tables: HcTables, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> Arrays:
        """Return what `encode` was given, each row by ascending frequency rank.

        Raises:
            CacheCorrupt: a rule of FORMAT.md is broken.
        """
        data = bytes(payload)
        if len(data) < _HEAD.size:
            raise broken(WRONG_LENGTH)
        size, entries = _HEAD.unpack_from(data)
        if size > len(data) - _HEAD.size:
            raise broken(WRONG_LENGTH)
        if entries > num_entries:
            raise broken(WRONG_ENTRIES)
        half, second = -(-num_tokens // 2), _HEAD.size + size
        lengths: list[int] = []
        rows: list[tuple[int, int]] = []
        for reader, last_token, last_entry in (
            (_Reader(tables, data[_HEAD.size : second]), half, entries),
            (_Reader(tables, data[second:]), num_tokens, num_entries),
        ):
            while len(lengths) < last_token:
                length = reader.size(0)
                if length > min(tables.num_draws, tables.vocab_size):
                    raise broken(TOO_MANY_ENTRIES)
                if length > last_entry - len(rows):
                    raise broken(WRONG_ENTRIES)
                lengths.append(length)
                rows.extend(_decode_row(reader, length))
            if len(rows) != last_entry:
                raise broken(WRONG_ENTRIES)
            reader.finish()
        ids, codes = np.array(rows, np.int32).reshape(-1, 2).T
        return np.array(lengths, np.int32), ids.copy(), codes.copy()


def broken(rule: str) -> CacheCorrupt:
    """Make the error for a payload that breaks a rule."""
    return CacheCorrupt("a block breaks the rules of the format", found=rule)


def _left_bucket(left: int) -> int:
    return sum(left >= limit for limit in (3, 5, 9, 17))


def _gap_context(previous_rank: int, left: int) -> int:
    return _GAP_CONTEXTS + previous_rank.bit_length() * 5 + _left_bucket(left)


def _count_context(excess: int, left: int) -> int:
    bucket = sum(excess >= limit for limit in (1, 2, 4, 7, 12, 20, 32))
    return _VALUE_CONTEXTS + bucket * 5 + _left_bucket(left)


def _logprob_context(left: int) -> int:
    return _VALUE_CONTEXTS + _left_bucket(left)


def _code_words(tables: HcTables, context: int) -> dict[str, int]:
    """Canonical code of a context: the bits of each word in the order of the stream, and its symbol."""
    lengths = tables.code_lengths[context].tolist()
    symbols = [symbol for symbol in range(len(lengths)) if tables.alphabets[context, symbol]]
    if len(symbols) == 1:
        return {"": symbols[0]}
    words = {}
    code, previous = -1, 0
    for length, symbol in sorted((lengths[symbol], symbol) for symbol in symbols):
        code, previous = (code + 1) << (length - previous), length
        words[f"{code:0{length}b}"] = symbol
    return words


class _Writer:
    """A list of bits."""

    def __init__(self, tables: HcTables) -> None:
        self.tables = tables
        self.bits: list[str] = []
        self._words: dict[int, dict[int, str]] = {}

    def symbol(self, context: int, symbol: int) -> None:
        """The code word of a symbol."""
        if context not in self._words:
            words = _code_words(self.tables, context)
            self._words[context] = {found: word for word, found in words.items()}
        self.bits.append(self._words[context][symbol])

    def raw(self, value: int, count: int) -> None:
        """The low bits of a value, lowest first."""
        self.bits.extend(str(value >> bit & 1) for bit in range(count))

    def size(self, context: int, value: int) -> None:
        """A row length or a count."""
        if value < 64:
            self.symbol(context, value)
            return
        octave = value.bit_length() - 1
        self.symbol(context, 64 + (octave - 6) * 4 + (value >> (octave - 2) & 3))
        self.raw(value, octave - 2)

    def payload(self) -> bytes:
        """All bits, the first lowest, padded with zeros to whole bytes."""
        bits = "".join(self.bits)
        return int("0" + bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")


class _Reader:
    """Bits from the front; zeros beyond the end, which `finish` finds out."""

    def __init__(self, tables: HcTables, payload: bytes) -> None:
        self.tables = tables
        self.payload = payload
        self.at = 0
        self._words: dict[int, dict[str, int]] = {}

    def raw(self, count: int) -> int:
        """An integer of so many bits, lowest first."""
        byte = self.at >> 3
        word = int.from_bytes(self.payload[byte : byte + 8], "little") >> (self.at & 7)
        self.at += count
        return word & ((1 << count) - 1)

    def symbol(self, context: int) -> int:
        """The symbol whose code word comes next."""
        if context not in self._words:
            self._words[context] = _code_words(self.tables, context)
        words = self._words[context]
        word = ""
        while word not in words:
            word += str(self.raw(1))
        return words[word]

    def size(self, context: int) -> int:
        """A row length or a count."""
        symbol = self.symbol(context)
        if symbol < 64:
            return symbol
        octave, quarter = 6 + (symbol - 64) // 4, (symbol - 64) % 4
        return (4 + quarter) << (octave - 2) | self.raw(octave - 2)

    def finish(self) -> None:
        """Refuses bytes left over or missing, and padding other than zeros."""
        if -(-self.at // 8) != len(self.payload):
            raise broken(WRONG_LENGTH)
        if self.raw(-self.at % 8):
            raise broken(PADDING)


def _encode_row(writer: _Writer, row: list[tuple[int, int]]) -> None:
    """One position: (rank, count or log-probability code), ascending."""
    writer.size(_LENGTH_CONTEXT, len(row))
    previous = 0
    excess = writer.tables.num_draws - len(row)
    for left, (rank, code) in zip(range(len(row), 0, -1), row, strict=True):
        gap = rank - previous
        assert gap > 0, "an id comes twice at one position"
        writer.symbol(_gap_context(previous, left), gap.bit_length() - 1)
        writer.raw(gap, gap.bit_length() - 1)
        previous = rank
        if writer.tables.kind == "logprobs":
            writer.symbol(_logprob_context(left), code.bit_length())
            writer.raw(code, max(code.bit_length() - 1, 0))
        elif left > 1:
            writer.size(_count_context(excess, left), code)
            excess -= code - 1


def _decode_row(reader: _Reader, length: int) -> list[tuple[int, int]]:
    """One position: (id, count or log-probability code), by ascending rank."""
    row = []
    rank = 0
    excess = reader.tables.num_draws - length
    for left in range(length, 0, -1):
        gap_class = reader.symbol(_gap_context(rank, left))
        rank += 1 << gap_class | reader.raw(gap_class)
        if rank > reader.tables.vocab_size:
            raise broken(RANK_TOO_LARGE)
        if reader.tables.kind == "logprobs":
            code_class = reader.symbol(_logprob_context(left))
            code = 1 << (code_class - 1) | reader.raw(code_class - 1) if code_class else 0
        elif left > 1:
            code = reader.size(_count_context(excess, left))
            excess -= code - 1
            if excess < 0:
                raise broken(COUNT_TOO_LARGE)
        else:
            code = excess + 1
        row.append((int(reader.tables.ids_by_rank[rank - 1]), code))
    return row
