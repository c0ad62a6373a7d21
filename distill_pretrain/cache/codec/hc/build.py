"""Tables of the entropy codec from pilot targets; integers only, so that they are the same bytes everywhere.

Legend: T positions, E entries, V vocabulary, N draws, C contexts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.hc.model import (
    LENGTH_CONTEXT,
    MAX_CODE_LENGTH,
    NUM_SYMBOLS,
    Integers,
    alphabets,
    bit_lengths,
    gap_contexts,
    num_contexts,
    size_symbols,
    value_contexts,
)
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.codec.target_checks import logprob_codes
from distill_pretrain.contracts import RaggedTargets, TargetKind

# A symbol never seen weighs a quarter of one seen once.
_SEEN_WEIGHT = 4


def build_tables(
    targets: Iterable[RaggedTargets], *, kind: TargetKind, num_draws: int, vocab_size: int
) -> HcTables:
    """Fit tables to targets like these; they have a code for any other targets of this kind, N and V.

    Args:
        targets: the pilot, valid targets whose order does not matter; all are held in memory.
        kind: of the targets.
        num_draws: N, 1 to 1024.
        vocab_size: V, 2 to 2**20.

    Raises:
        TeacherError: log-probabilities are positive, NaN, or add up to more than 1.
    """
    pilot = list(targets)
    assert all(block.kind == kind and block.num_draws == num_draws for block in pilot), kind
    seen = np.zeros(vocab_size, np.int64)
    for block in pilot:
        seen += np.bincount(block.ids, minlength=vocab_size)
    ids_by_rank = np.argsort(-seen, kind="stable").astype(np.int32)
    ranks = np.empty(vocab_size, np.int64)
    ranks[ids_by_rank] = np.arange(1, vocab_size + 1)

    histogram = np.zeros(num_contexts(kind) * NUM_SYMBOLS, np.int64)
    for block in pilot:
        for contexts, symbols in block_symbols(block, ranks):
            places = contexts * NUM_SYMBOLS + symbols
            histogram += np.bincount(places, minlength=len(histogram))
    weights = (histogram * _SEEN_WEIGHT + 1).reshape(-1, NUM_SYMBOLS)

    code_lengths = np.zeros(weights.shape, np.uint8)
    for context, allowed in enumerate(alphabets(kind, num_draws, vocab_size)):
        code_lengths[context, allowed] = limited_code_lengths(weights[context, allowed].tolist())
    return HcTables(
        kind=kind,
        num_draws=num_draws,
        vocab_size=vocab_size,
        ids_by_rank=ids_by_rank,
        code_lengths=code_lengths,
    )


def block_symbols(
    targets: RaggedTargets, ranks: npt.NDArray[np.int64]
) -> Iterator[tuple[Integers, Integers]]:
    """Return (contexts, symbols) of row lengths, of gaps and of coded values, int64 each.

    Args:
        targets: of one block.
        ranks: int64[V], rank of an id from 1.
    """
    lengths = targets.entries_per_token.astype(np.int64)
    yield np.full(len(lengths), LENGTH_CONTEXT), size_symbols(lengths)
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(rows)) - starts[rows]
    left = lengths[rows] - place

    order = np.argsort(rows << 21 | ranks[targets.ids], kind="stable")
    sorted_ranks = ranks[targets.ids[order]]
    previous = np.where(place == 0, 0, np.roll(sorted_ranks, 1))
    yield gap_contexts(previous, left), bit_lengths(sorted_ranks - previous) - 1

    if targets.kind == "logprobs":
        codes = logprob_codes(targets)[order]
        yield value_contexts("logprobs", left, left), bit_lengths(codes)
        return
    counts = targets.values[order].astype(np.int64)
    before = np.cumsum(counts) - counts
    excess = targets.num_draws - (before - before[starts[rows]]) - left
    coded = left > 1
    yield value_contexts("counts", excess[coded], left[coded]), size_symbols(counts[coded])


def limited_code_lengths(weights: Sequence[int]) -> list[int]:
    """Return the lengths of the best complete prefix code of at most MAX_CODE_LENGTH bits (package-merge).

    Larmore and Hirschberg 1990. Of equal weights the earlier symbol goes first, and symbols before packages.

    Args:
        weights: positive, at most 2^MAX_CODE_LENGTH of them; a lone symbol gets 0 bits.
    """
    lengths = [0] * len(weights)
    if len(weights) == 1:
        return lengths
    leaves = sorted(((weight, [symbol]) for symbol, weight in enumerate(weights)), key=_weight)
    merged = leaves
    for _ in range(MAX_CODE_LENGTH - 1):
        pairs = zip(merged[::2], merged[1::2], strict=False)
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
        merged = sorted(leaves + packages, key=_weight)
    for _, symbols in merged[: 2 * len(weights) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def _weight(item: tuple[int, list[int]]) -> int:
    return item[0]
