"""The fixed-width codec: one block of targets as bytes. FORMAT.md is the specification.

Legend: T positions of the block, E entries in all, V vocabulary, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.target_checks import (
    counts_problem,
    logprob_codes,
    logprobs_of_codes,
    logprobs_problem,
    order_problem,
    structure_problem,
)
from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.errors import CacheCorrupt


@dataclass(frozen=True, kw_only=True)
class RawCodec:
    """Encodes and decodes blocks at a fixed width per entry.

    Attributes:
        kind: "counts" (codec 1) or "logprobs" (codec 2).
        num_draws: N, 1 to 65535.
        vocab_size: V, 2 to 2**20.
    """

    kind: TargetKind
    num_draws: int
    vocab_size: int

    @property
    def tables_sha256(self) -> None:
        """None: this codec has no tables."""
        return None

    @cached_property
    def id_bits(self) -> int:
        """The number of bits of the largest token id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @cached_property
    def entry_bytes(self) -> int:
        """The number of bytes per stored entry."""
        if self.kind == "counts":
            return -(-(self.id_bits + (self.num_draws - 1).bit_length()) // 8)
        return -(-self.id_bits // 8) + 2

    @cached_property
    def length_dtype(self) -> np.dtype[Any]:
        """The integer type of the number of entries of a position."""
        return np.dtype("u1") if self.num_draws <= 255 else np.dtype("<u2")

    @cached_property
    def max_entries_per_token(self) -> int:
        """The most entries of a position: min(N, V)."""
        return min(self.num_draws, self.vocab_size)

    def payload_bytes(self, num_tokens: int, num_entries: int) -> int:
        """Return the exact size of a block's payload, in bytes."""
        return num_tokens * self.length_dtype.itemsize + num_entries * self.entry_bytes

    def payload_bounds(self, num_tokens: int, num_entries: int) -> tuple[int, int]:
        """Return the least and the most bytes of a block's payload: both are its exact size."""
        size = self.payload_bytes(num_tokens, num_entries)
        return size, size

    def encode(self, targets: RaggedTargets) -> bytes:
        """Encode one block; the ids of a position must ascend, as `decode` gives them.

        Raises:
            TeacherError: log-probabilities are positive, NaN, or add up to more than 1.
        """
        assert targets.kind == self.kind and targets.num_draws == self.num_draws, targets.kind
        problem = self._structure_problem(targets.entries_per_token, targets.ids)
        assert problem is None and len(targets.values) == len(targets.ids), problem
        if self.kind == "counts":
            problem = counts_problem(targets)
            assert problem is None, problem
            codes = targets.values.astype(np.uint32) - np.uint32(1)
            entries = _to_bytes(
                targets.ids.astype(np.uint32) | (codes << np.uint32(self.id_bits)),
                self.entry_bytes,
            )
        else:
            codes = logprob_codes(targets)
            ids = _to_bytes(targets.ids.astype(np.uint32), self.entry_bytes - 2)
            entries = np.concatenate([ids, _to_bytes(codes, 2)], axis=1)
        lengths = targets.entries_per_token.astype(self.length_dtype)
        return lengths.tobytes() + entries.tobytes()

    def decode(
        self, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> RaggedTargets:
        """Decode one block; nothing is allocated before the payload's length is right.

        Args:
            payload: bytes of the block.
            num_tokens: T.
            num_entries: E.

        Raises:
            CacheCorrupt: any rule of FORMAT.md is broken.
        """
        expected = self.payload_bytes(num_tokens, num_entries)
        if num_tokens < 0 or num_entries < 0 or len(payload) != expected:
            raise CacheCorrupt(
                "a block's payload has the wrong length",
                found=f"{len(payload)} bytes",
                expected=f"{expected} bytes for {num_tokens} positions, {num_entries} entries",
            )
        lengths = np.frombuffer(payload, self.length_dtype, num_tokens).astype(np.int32)
        raw = np.frombuffer(payload, np.uint8, offset=num_tokens * self.length_dtype.itemsize)
        raw = raw.reshape(num_entries, self.entry_bytes)
        values: npt.NDArray[Any]
        if self.kind == "counts":
            words = _from_bytes(raw)
            ids = (words & np.uint32((1 << self.id_bits) - 1)).astype(np.int32)
            values = (words >> np.uint32(self.id_bits)).astype(np.int32) + np.int32(1)
        else:
            ids = _from_bytes(raw[:, :-2]).astype(np.int32)
            values = logprobs_of_codes(_from_bytes(raw[:, -2:]))
        problem = self._structure_problem(lengths, ids)
        targets = RaggedTargets(
            kind=self.kind,
            num_draws=self.num_draws,
            entries_per_token=lengths,
            ids=ids,
            values=values,
        )
        if problem is None and self.kind == "counts":
            problem = counts_problem(targets)
        elif problem is None:
            problem = logprobs_problem(targets)
        if problem is not None:
            raise CacheCorrupt("a block breaks the rules of the format", found=problem)
        return targets

    def _structure_problem(
        self, lengths: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> str | None:
        problem = structure_problem(
            lengths,
            ids,
            max_entries_per_token=self.max_entries_per_token,
            vocab_size=self.vocab_size,
        )
        return problem or order_problem(lengths, ids)


def _to_bytes(words: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.uint8]:
    """uint8[E, width], little-endian low bytes."""
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]


def _from_bytes(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """uint32[E] of little-endian rows."""
    # Byte by byte: numpy copies [E, 3] rows several times slower than three strided columns.
    words = raw[:, 0].astype(np.uint32)
    for byte in range(1, raw.shape[1]):
        words |= raw[:, byte].astype(np.uint32) << np.uint32(8 * byte)
    return words
