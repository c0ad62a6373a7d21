"""In which order a run visits sequences: a pure function of (seed, epoch, position), for any world size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.document_order import mix64

_ROUNDS = 6
_U64 = np.uint64


class VisitOrder:
    """Every epoch is its own permutation of the sequences, computed per position in O(1) memory.

    A Feistel network over the next even power of two, walked until it lands inside the range.

    Args:
        num_sequences: length of an epoch.
        seed: of all permutations.
    """

    def __init__(self, num_sequences: int, *, seed: int) -> None:
        assert num_sequences >= 1
        self.num_sequences = num_sequences
        self.seed = seed
        self._half_bits = max(1, -(-max(1, (num_sequences - 1).bit_length()) // 2))

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return sequence numbers, int64[n], at positions int64[n] counted from the start of training."""
        epoch = positions.astype(np.uint64) // _U64(self.num_sequences)
        x = positions.astype(np.uint64) % _U64(self.num_sequences)
        x = self._encrypt(x, epoch)
        outside = x >= _U64(self.num_sequences)
        while outside.any():
            x[outside] = self._encrypt(x[outside], epoch[outside])
            outside = x >= _U64(self.num_sequences)
        return x.astype(np.int64)

    def _encrypt(
        self, x: npt.NDArray[np.uint64], epoch: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        half = _U64(self._half_bits)
        mask = _U64((1 << self._half_bits) - 1)
        with np.errstate(over="ignore"):
            key = mix64(epoch * _U64(0x9E3779B97F4A7C15) + mix64(np.full_like(x, self.seed)))
            left, right = x >> half, x & mask
            for number in range(_ROUNDS):
                f = mix64(right + key + _U64(number) * _U64(0xD1B54A32D192ED03))
                left, right = right, left ^ (f & mask)
        joined: npt.NDArray[np.uint64] = (left << half) | right
        return joined
