"""Contexts and symbols of the entropy codec: which code is used when, and what it can say. FORMAT.md specifies them.

Legend: V vocabulary, N draws, C contexts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.contracts import TargetKind

MAX_CODE_LENGTH = 8
NUM_SYMBOLS = 81
LENGTH_CONTEXT = 0
GAP_CONTEXTS = 1
VALUE_CONTEXTS = 111
LEFT_BUCKETS = 5

_NUM_RANK_CLASSES = 22
_GAP_CLASSES = 21
_LOGPROB_CLASSES = 17
_LEFT_LIMITS = np.array([3, 5, 9, 17])
_EXCESS_LIMITS = np.array([1, 2, 4, 7, 12, 20, 32])
_POWERS = 1 << np.arange(21, dtype=np.int64)

Integers = npt.NDArray[np.int64]


def num_contexts(kind: TargetKind) -> int:
    """Return C, the number of contexts; each has a prefix code of its own."""
    values = (len(_EXCESS_LIMITS) + 1) * LEFT_BUCKETS if kind == "counts" else LEFT_BUCKETS
    return VALUE_CONTEXTS + values


def bit_lengths(values: npt.NDArray[Any]) -> Integers:
    """Return the number of bits of integers from 0 to 2^21 - 1, exactly."""
    return np.searchsorted(_POWERS, values, side="right").astype(np.int64)


def size_symbols(values: npt.NDArray[Any]) -> Integers:
    """Return the symbols of row lengths or counts, 0 to 1024: itself below 64, then a quarter of an octave each."""
    octave = np.maximum(bit_lengths(values) - 1, 6)
    return np.where(values < 64, values, 64 + (octave - 6) * 4 + ((values >> (octave - 2)) & 3))


def gap_contexts(previous_ranks: npt.NDArray[Any], left: npt.NDArray[Any]) -> Integers:
    """Return the contexts of gap classes; the previous rank is 0 before the first entry, `left` counts this entry."""
    return GAP_CONTEXTS + bit_lengths(previous_ranks) * LEFT_BUCKETS + _left_buckets(left)


def value_contexts(
    kind: TargetKind, excess: npt.NDArray[Any], left: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Return the contexts of values; `excess` is the draws not yet counted less the entries left."""
    if kind == "logprobs":
        return VALUE_CONTEXTS + _left_buckets(left)
    buckets = np.searchsorted(_EXCESS_LIMITS, excess, side="right").astype(np.int64)
    return VALUE_CONTEXTS + buckets * LEFT_BUCKETS + _left_buckets(left)


def alphabets(kind: TargetKind, num_draws: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Return bool[C, 81]: the symbols that each context has a code for, at least one."""
    symbols = np.arange(NUM_SYMBOLS)
    allowed = np.zeros((num_contexts(kind), NUM_SYMBOLS), np.bool_)
    most_entries = min(num_draws, vocab_size)
    allowed[LENGTH_CONTEXT] = symbols <= _size_symbol(most_entries)
    for rank_class in range(_NUM_RANK_CLASSES):
        smallest_rank = (1 << rank_class) >> 1
        largest_gap = max(1, vocab_size - smallest_rank)
        first = GAP_CONTEXTS + rank_class * LEFT_BUCKETS
        allowed[first : first + LEFT_BUCKETS] = symbols < largest_gap.bit_length()
    if kind == "logprobs":
        allowed[VALUE_CONTEXTS:] = symbols < _LOGPROB_CLASSES
        return allowed
    for bucket, limit in enumerate([*_EXCESS_LIMITS.tolist(), num_draws]):
        largest_count = max(1, min(limit, num_draws - 1))
        first = VALUE_CONTEXTS + bucket * LEFT_BUCKETS
        row = (symbols >= 1) & (symbols <= _size_symbol(largest_count))
        allowed[first : first + LEFT_BUCKETS] = row
    return allowed


def raw_bits(kind: TargetKind) -> npt.NDArray[np.int64]:
    """Return int64[C, 81]: the number of bits that follow each symbol as they are, without a code."""
    symbols = np.arange(NUM_SYMBOLS)
    bits = np.zeros((num_contexts(kind), NUM_SYMBOLS), np.int64)
    bits[:] = np.where(symbols < 64, 0, 4 + (symbols - 64) // 4)
    bits[GAP_CONTEXTS:VALUE_CONTEXTS] = np.where(symbols < _GAP_CLASSES, symbols, 0)
    if kind == "logprobs":
        bits[VALUE_CONTEXTS:] = np.where(symbols < _LOGPROB_CLASSES, np.maximum(symbols - 1, 0), 0)
    return bits


def _left_buckets(left: npt.NDArray[Any]) -> Integers:
    return np.searchsorted(_LEFT_LIMITS, left, side="right").astype(np.int64)


def _size_symbol(value: int) -> int:
    return int(size_symbols(np.array([value]))[0])
