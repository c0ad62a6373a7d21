"""Which corpus of a blend, and which of its sequences, a position of training takes: a closed form in the position.

Source 0 with share w owns position n where floor((n + 1) w) > floor(n w) (Bresenham's line). The positions it leaves
are numbered m = n - floor(n w) and split the same way among the other sources. After n positions source j has been
taken within j + 1 of n times its share, in any stretch of training and for any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distill_pretrain.data.order import VisitOrder
from distill_pretrain.errors import ConfigError

_BITS = 32
_ONE = 1 << _BITS
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 4096


class BlendOrder:
    """The visiting order of a blend; with one source, its `VisitOrder`.

    Attributes:
        splits: see `blend_splits`.
    """

    def __init__(
        self, num_sequences: Sequence[int], weights: Sequence[float], *, seed: int
    ) -> None:
        """Split by weight.

        Args:
            num_sequences: length of an epoch of each source.
            weights: of each source, positive.
            seed: of the permutations; every source has its own.

        Raises:
            ConfigError: a weight is so small beside the others that its source would never be visited.
        """
        assert len(num_sequences) == len(weights) >= 1
        self.splits = blend_splits(weights)
        self._orders = [
            VisitOrder(count, seed=(seed + number * _GOLDEN) % (1 << 64))
            for number, count in enumerate(num_sequences)
        ]
        self._block = lru_cache(maxsize=2)(self._compute_block)

    def __getitem__(
        self, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return source and sequence number, int64[n] each, at positions int64[n] from the start of training."""
        sources, places = self.split(positions)
        sequences = np.empty_like(places)
        for number, order in enumerate(self._orders):
            mine = sources == number
            sequences[mine] = order[places[mine]]
        return sources, sequences

    def span(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the same at `count` positions from `first` on.

        Made and kept by the block: a few positions take as long as thousands.
        """
        blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
        sources, sequences = np.concatenate([self._block(number) for number in blocks], axis=1)
        wanted = slice(first - blocks[0] * _BLOCK, first - blocks[0] * _BLOCK + count)
        return sources[wanted], sequences[wanted]

    def _compute_block(self, number: int) -> npt.NDArray[np.int64]:
        """int64[2, _BLOCK]: sources, sequences."""
        return np.stack(self[np.arange(_BLOCK, dtype=np.int64) + number * _BLOCK])

    def split(
        self, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the source int64[n], and how often it was taken before, int64[n]; positions below 2^62."""
        sources = np.empty_like(positions)
        places = np.empty_like(positions)
        left = np.arange(len(positions))
        rest = positions
        for number, share in enumerate(self.splits):
            before = _times(rest, share)
            owned = _times(rest + 1, share) > before
            sources[left[owned]] = number
            places[left[owned]] = before[owned]
            left, rest = left[~owned], (rest - before)[~owned]
        return sources, places


def _times(n: npt.NDArray[np.int64], share: int) -> npt.NDArray[np.int64]:
    """floor(n * share / 2^32), exactly: the product itself would not fit 64 bits."""
    high, low = n >> _BITS, n & (_ONE - 1)
    product = low.astype(np.uint64) * np.uint64(share)
    result: npt.NDArray[np.int64] = high * share + (product >> np.uint64(_BITS)).astype(np.int64)
    return result


def blend_splits(weights: Sequence[float]) -> tuple[int, ...]:
    """Turn the weights of sources into the splits by which a blend walks down its sources.

    Split j is source j's share of what the sources before it leave, as an integer over 2^32.

    Raises:
        ConfigError: a weight is so small beside the others that its source would never be visited.
    """
    exact = [Fraction(weight) for weight in weights]
    splits = [round(weight / sum(exact[level:]) * _ONE) for level, weight in enumerate(exact)]
    if 0 in splits or _ONE in splits[:-1]:
        raise ConfigError(
            "a weight of the blend is too small beside the others: its source would never be visited",
            where="data.weight, data.blend",
            found=", ".join(map(str, weights)),
            expected="shares of at least 1 in 2^32",
            remedy="raise the weight, or leave the source out",
        )
    return tuple(splits)
