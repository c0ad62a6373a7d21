"""Philox4x32-10: a counter-based generator, so a draw depends on its name and on nothing before it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
Legend: T positions, N draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RNG_NAME = "philox4x32-10"

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Uint64Array = npt.NDArray[np.uint64]


def philox4x32(key: tuple[int, int], counter: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Run ten rounds over every counter.

    Args:
        key: two 32-bit words.
        counter: uint32[..., 4].

    Returns:
        uint32[..., 4].
    """
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0 = (p1 >> _SHIFT32) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> _SHIFT32) ^ c3 ^ np.uint64(k1)
        c1 = p1 & _MASK32
        c3 = p0 & _MASK32
        k0 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def draws64(seed: int, stream: int, positions: Uint64Array, num_draws: int) -> Uint64Array:
    """Return uniform 64-bit words, two per Philox call.

    Args:
        seed: key, in [0, 2**64).
        stream: keeps the draws of different estimators apart, in [0, 2**32).
        positions: uint64[T], the plan's sequence * seq_len + offset.
        num_draws: N.

    Returns:
        uint64[T, N]; draw n is words 2 * (n % 2) (low) and 2 * (n % 2) + 1 (high) of the counter
        (position low, position high, n // 2, stream).
    """
    num_calls = -(-num_draws // 2)
    counter = np.empty((len(positions), num_calls, 4), np.uint32)
    counter[..., 0] = (positions & _MASK32)[:, None]
    counter[..., 1] = (positions >> _SHIFT32)[:, None]
    counter[..., 2] = np.arange(num_calls)
    counter[..., 3] = stream
    words = philox4x32((seed & 0xFFFFFFFF, seed >> 32), counter).astype(np.uint64)
    pairs = words[..., 0::2] | (words[..., 1::2] << _SHIFT32)
    draws: Uint64Array = pairs.reshape(len(positions), 2 * num_calls)[:, :num_draws]
    return draws


def umul64hi(a: Uint64Array, b: Uint64Array) -> Uint64Array:
    """Return the upper 64 bits of the 128-bit products: floor(a * b / 2**64), element by element."""
    a_low, a_high, b_low, b_high = a & _MASK32, a >> _SHIFT32, b & _MASK32, b >> _SHIFT32
    low, cross_a, cross_b = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (low >> _SHIFT32) + (cross_a & _MASK32) + (cross_b & _MASK32)
    high: Uint64Array = (
        a_high * b_high + (cross_a >> _SHIFT32) + (cross_b >> _SHIFT32) + (middle >> _SHIFT32)
    )
    return high
