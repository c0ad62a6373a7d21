"""Tables of the entropy codec: frequency ranks of the ids and one prefix code per context. FORMAT.md has the bytes.

Legend: V vocabulary, N draws, C contexts, L largest code length.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.hc.model import (
    GAP_CONTEXTS,
    LEFT_BUCKETS,
    LENGTH_CONTEXT,
    MAX_CODE_LENGTH,
    NUM_SYMBOLS,
    VALUE_CONTEXTS,
    alphabets,
    num_contexts,
    raw_bits,
)
from distill_pretrain.contracts import TargetKind
from distill_pretrain.errors import CacheCorrupt

_MAGIC = b"\x89DPC\r\n\x1a\n"
_VERSION = 1
_HEADER = struct.Struct("<8sHHIHHI")
_KINDS: dict[int, TargetKind] = {1: "counts", 2: "logprobs"}
_MOST_DRAWS = 1024
_LARGEST_VOCAB = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class HcTables:
    """Tables of the entropy codec that keep every rule of FORMAT.md.

    Attributes:
        kind: "counts" or "logprobs".
        num_draws: N, 1 to 1024.
        vocab_size: V, 2 to 2**20.
        ids_by_rank: int32[V], a permutation; the most frequent id first (rank 1).
        code_lengths: uint8[C, 81], bits of the code of a symbol in a context; 0 where it has none, and for the only
            symbol of a context.
    """

    kind: TargetKind
    num_draws: int
    vocab_size: int
    ids_by_rank: npt.NDArray[np.int32]
    code_lengths: npt.NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """Return the contents of the tables file."""
        kind = next(number for number, name in _KINDS.items() if name == self.kind)
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            kind,
            self.vocab_size,
            self.num_draws,
            MAX_CODE_LENGTH,
            len(self.code_lengths),
        )
        body = header + self.ids_by_rank.astype("<u4").tobytes() + self.code_lengths.tobytes()
        return body + struct.pack("<I", zlib.crc32(body))

    @staticmethod
    def from_bytes(data: bytes | memoryview, *, where: object = None) -> HcTables:
        """Read tables from their file's contents, and check every rule of FORMAT.md.

        Args:
            data: the file.
            where: its name, for messages.

        Raises:
            CacheCorrupt: a rule is broken.
        """

        def corrupt(found: str, expected: str | None = None) -> CacheCorrupt:
            return CacheCorrupt(
                "the codec's tables are damaged",
                where=where,
                found=found,
                expected=expected,
                remedy="copy the file again from a sound copy of the cache",
            )

        if len(data) < _HEADER.size + 4:
            raise corrupt(f"{len(data)} bytes", "a whole header")
        magic, version, kind, vocab_size, num_draws, longest, contexts = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise corrupt(repr(magic), repr(_MAGIC))
        if version != _VERSION or longest != MAX_CODE_LENGTH:
            raise corrupt(
                f"version {version} with codes of {longest} bits",
                f"version {_VERSION}, {MAX_CODE_LENGTH} bits",
            )
        if kind not in _KINDS or contexts != num_contexts(_KINDS[kind]):
            raise corrupt(f"kind {kind} with {contexts} contexts")
        if not (2 <= vocab_size <= _LARGEST_VOCAB and 1 <= num_draws <= _MOST_DRAWS):
            raise corrupt(f"V = {vocab_size}, N = {num_draws}")
        size = _HEADER.size + 4 * vocab_size + contexts * NUM_SYMBOLS + 4
        if len(data) != size:
            raise corrupt(f"{len(data)} bytes", f"{size} bytes")
        if struct.unpack_from("<I", data, size - 4)[0] != zlib.crc32(data[: size - 4]):
            raise corrupt("another checksum")
        ids = np.frombuffer(data, "<u4", vocab_size, _HEADER.size)
        lengths = np.frombuffer(
            data, np.uint8, contexts * NUM_SYMBOLS, _HEADER.size + 4 * vocab_size
        )
        tables = HcTables(
            kind=_KINDS[kind],
            num_draws=num_draws,
            vocab_size=vocab_size,
            ids_by_rank=ids.astype(np.int64).clip(max=vocab_size).astype(np.int32),
            code_lengths=lengths.reshape(contexts, NUM_SYMBOLS).copy(),
        )
        problem = tables._problem()
        if problem is not None:
            raise corrupt(problem)
        return tables

    @cached_property
    def sha256(self) -> str:
        """The hex digest of the tables file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def alphabets(self) -> npt.NDArray[np.bool_]:
        """The symbols that each context has a code for, bool[C, 81]."""
        return alphabets(self.kind, self.num_draws, self.vocab_size)

    @cached_property
    def ranks_by_id(self) -> npt.NDArray[np.int32]:
        """The frequency rank of every id, int32[V], from 1."""
        ranks = np.empty(self.vocab_size, np.int32)
        ranks[self.ids_by_rank] = np.arange(1, self.vocab_size + 1, dtype=np.int32)
        return ranks

    @cached_property
    def codes(self) -> npt.NDArray[np.uint16]:
        """The codes as they lie in the stream, uint16[C, 81], their first bit lowest."""
        codes = np.zeros(self.code_lengths.shape, np.uint16)
        for row, lengths in zip(codes, self.code_lengths.tolist(), strict=True):
            code = previous = 0
            for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
                code <<= length - previous
                row[symbol] = int(f"{code:0{length}b}"[::-1], 2)
                code, previous = code + 1, length
        return codes

    @cached_property
    def lookup(self) -> npt.NDArray[np.uint16]:
        """What a decoder looks up, uint16[C, 2^L]: symbol * 16 + code length for every value of the next L bits."""
        lookup = np.zeros((len(self.code_lengths), 1 << MAX_CODE_LENGTH), np.uint16)
        for context, symbol in np.argwhere(self.alphabets).tolist():
            length = int(self.code_lengths[context, symbol])
            lookup[context, self.codes[context, symbol] :: 1 << length] = symbol << 4 | length
        return lookup

    def payload_bounds(self, num_tokens: int, num_entries: int) -> tuple[int, int]:
        """Return the least and the most bytes of a block of T positions and E <= T * min(N, V) entries."""
        length, first, later, value = self._bit_bounds
        fewest_rows = -(-num_entries // min(self.num_draws, self.vocab_size))
        least = num_tokens * length[0] + fewest_rows * first[0]
        least += (num_entries - fewest_rows) * later[0]
        most = num_tokens * length[1] + num_entries * max(first[1], later[1])
        if self.kind == "logprobs":
            least += num_entries * value[0]
            most += num_entries * value[1]
        else:
            most += (num_entries - fewest_rows) * value[1]
        # Two streams, each padded to bytes, after their lengths.
        return 8 + -(-least // 8), 9 + -(-most // 8)

    @cached_property
    def _bit_bounds(self) -> list[tuple[int, int]]:
        """Fewest and most bits of a row length, a first gap, a later gap, a value."""
        bits = self.code_lengths + raw_bits(self.kind)
        later = GAP_CONTEXTS + LEFT_BUCKETS
        return [
            (int(part.min()), int(part.max()))
            for part in (
                bits[rows][self.alphabets[rows]]
                for rows in (
                    slice(LENGTH_CONTEXT, GAP_CONTEXTS),
                    slice(GAP_CONTEXTS, later),
                    slice(later, VALUE_CONTEXTS),
                    slice(VALUE_CONTEXTS, None),
                )
            )
        ]

    def _problem(self) -> str | None:
        seen = np.zeros(self.vocab_size + 1, np.bool_)
        seen[self.ids_by_rank] = True
        if not seen[:-1].all():
            return "the ranked ids are no permutation of the vocabulary"
        if np.any(self.code_lengths[~self.alphabets]):
            return "a code for a symbol that cannot occur"
        lone = self.alphabets.sum(1) == 1
        if np.any(self.code_lengths[lone]):
            return "a code of more than 0 bits for the only symbol of a context"
        lengths = self.code_lengths[~lone].astype(np.int64)
        used = self.alphabets[~lone]
        if np.any(used & ((lengths < 1) | (lengths > MAX_CODE_LENGTH))):
            return "a code length out of range"
        shares = np.where(used, 1 << (MAX_CODE_LENGTH - lengths), 0).sum(1)
        if np.any(shares != 1 << MAX_CODE_LENGTH):
            return "the codes of a context are not complete"
        return None


def address(array: npt.NDArray[Any]) -> int:
    """Return where an array's first element lies in memory; several times faster than `array.ctypes`."""
    first: int = array.__array_interface__["data"][0]
    return first
