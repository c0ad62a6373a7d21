"""The fixed-width codec: one block of targets as bytes. FORMAT.md is the specification.

Legend: T positions of the block, E entries in all, V vocabulary, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import RaggedTargets, TargetKind
from distill_pretrain.errors import CacheCorrupt, TeacherError

COUNTS_CODEC = 1
LOGPROBS_CODEC = 2
CODEC_KINDS: dict[int, TargetKind] = {COUNTS_CODEC: "counts", LOGPROBS_CODEC: "logprobs"}

LOGPROB_SCALE = 2048
_LARGEST_LOGPROB_CODE = 65535
# Rounding to 1/2048 moves a probability by at most 1/4096 of itself.
_LARGEST_ROW_MASS = 1.0 + 2.0**-11


def codec_of_sampler(sampler: str) -> int:
    """Codec id that stores what a sampler yields."""
    return LOGPROBS_CODEC if sampler == "topk" else COUNTS_CODEC


@dataclass(frozen=True, kw_only=True)
class RawCodec:
    """Encoder and decoder of blocks.

    Attributes:
        kind: "counts" (codec 1) or "logprobs" (codec 2).
        num_draws: N, 1 to 65535.
        vocab_size: V, 2 to 2**20.
    """

    kind: TargetKind
    num_draws: int
    vocab_size: int

    @cached_property
    def id_bits(self) -> int:
        """Bits of the largest token id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @cached_property
    def entry_bytes(self) -> int:
        """Bytes per stored entry."""
        if self.kind == "counts":
            return -(-(self.id_bits + (self.num_draws - 1).bit_length()) // 8)
        return -(-self.id_bits // 8) + 2

    @cached_property
    def length_dtype(self) -> np.dtype[Any]:
        """Integer type of the number of entries of a position."""
        return np.dtype("u1") if self.num_draws <= 255 else np.dtype("<u2")

    @cached_property
    def max_entries_per_token(self) -> int:
        """Most entries of a position: min(N, V)."""
        return min(self.num_draws, self.vocab_size)

    def payload_bytes(self, num_tokens: int, num_entries: int) -> int:
        """Exact payload size of a block."""
        return num_tokens * self.length_dtype.itemsize + num_entries * self.entry_bytes

    def encode(self, targets: RaggedTargets) -> bytes:
        """Payload of one block.

        Raises:
            TeacherError: log-probabilities are positive, NaN, or add up to more than 1.
        """
        assert targets.kind == self.kind and targets.num_draws == self.num_draws, targets.kind
        problem = self._structure_problem(targets.entries_per_token, targets.ids)
        assert problem is None and len(targets.values) == len(targets.ids), problem
        if self.kind == "counts":
            problem = self._counts_problem(targets)
            assert problem is None, problem
            codes = targets.values.astype(np.uint32) - np.uint32(1)
            entries = _to_bytes(
                targets.ids.astype(np.uint32) | (codes << np.uint32(self.id_bits)),
                self.entry_bytes,
            )
        else:
            problem = _logprobs_problem(targets)
            if problem is not None:
                raise TeacherError(
                    "top-k log-probabilities are no distribution",
                    found=problem,
                    expected="values <= 0 whose probabilities add up to at most 1",
                    remedy="check the teacher's weights and dtype",
                )
            scaled = np.rint(targets.values.astype(np.float64) * -LOGPROB_SCALE)
            codes = np.minimum(scaled, _LARGEST_LOGPROB_CODE).astype(np.uint32)
            ids = _to_bytes(targets.ids.astype(np.uint32), self.entry_bytes - 2)
            entries = np.concatenate([ids, _to_bytes(codes, 2)], axis=1)
        lengths = targets.entries_per_token.astype(self.length_dtype)
        return lengths.tobytes() + entries.tobytes()

    def decode(
        self, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> RaggedTargets:
        """Targets of one block; nothing is allocated before the payload's length is right.

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
            values = _from_bytes(raw[:, -2:]).astype(np.float32) / np.float32(-LOGPROB_SCALE)
        problem = self._structure_problem(lengths, ids)
        targets = RaggedTargets(
            kind=self.kind,
            num_draws=self.num_draws,
            entries_per_token=lengths,
            ids=ids,
            values=values,
        )
        if problem is None and self.kind == "counts":
            problem = self._counts_problem(targets)
        elif problem is None:
            problem = _logprobs_problem(targets)
        if problem is not None:
            raise CacheCorrupt("a block breaks the rules of the format", found=problem)
        return targets

    def _structure_problem(
        self, lengths: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> str | None:
        if len(lengths) and (lengths.min() < 0 or lengths.max() > self.max_entries_per_token):
            return f"{lengths.max()} entries at one position, at most {self.max_entries_per_token}"
        if int(lengths.sum(dtype=np.int64)) != len(ids):
            return f"{len(ids)} entries, but the positions count {lengths.sum(dtype=np.int64)}"
        if len(ids) == 0:
            return None
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            return f"token id {ids.max()} outside the vocabulary of {self.vocab_size}"
        ascending = np.ones(len(ids) + 1, np.bool_)
        np.greater(ids[1:], ids[:-1], out=ascending[1:-1])
        ascending[np.cumsum(lengths)] = True
        if not ascending.all():
            return "token ids of a position do not ascend"
        return None

    def _counts_problem(self, targets: RaggedTargets) -> str | None:
        values = targets.values
        if len(values) and (values.min() < 1 or values.max() > self.num_draws):
            return f"a count of {values.max()}, expected 1 to {self.num_draws}"
        sums = _row_sums(targets)
        if np.any(sums != self.num_draws):
            return f"counts of a position add up to {sums[sums != self.num_draws][0]}"
        return None


def _logprobs_problem(targets: RaggedTargets) -> str | None:
    values = targets.values
    if not np.all(values <= 0):
        return "a log-probability is positive or NaN"
    probs = np.exp(values.astype(np.float64))
    masses = _row_sums(targets, probs)
    if np.any(masses > _LARGEST_ROW_MASS):
        return f"probabilities of a position add up to {masses.max():.6f}"
    return None


def _row_sums(targets: RaggedTargets, values: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Sums over the non-empty rows."""
    lengths = targets.entries_per_token
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    summed = targets.values if values is None else values
    if len(starts) == 0:
        return np.zeros(0, summed.dtype)
    sums: npt.NDArray[Any] = np.add.reduceat(summed, starts)
    return sums


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
