"""The samplers that draw: the points that they put on the ids' weights, and the error that this leaves.

Legend: T positions, V vocabulary, N draws, W the sum of a position's integer weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.sampling.philox import Uint64Array, umul64hi

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Drawing(NamedTuple):
    """How a sampler draws.

    Attributes:
        points: random words uint64[T, N] (or [T, 1], see `kinds`), totals int64[T] and N to points int64[T, N] in
            [0, W); every id gets the points that fall on its weight, N w / W of them in expectation.
        errors: probabilities t float64[T, V] in the order of the ids and N to the expected squared error float64[T]
            of counts / N, summed over V.
    """

    points: Callable[[Uint64Array, Int64Array, int], Int64Array]
    errors: Callable[[Float64Array, int], Float64Array]


def multinomial_points(draws: Uint64Array, totals: Int64Array, num_draws: int) -> Int64Array:
    """Return independent points r = floor(x * W / 2**64) in [0, W), int64[T, N].

    Args:
        draws: uint64[T, N], x, uniform.
        totals: int64[T], W.
        num_draws: N.
    """
    assert draws.shape == (len(totals), num_draws), draws.shape
    return umul64hi(draws, totals.astype(np.uint64)[:, None]).astype(np.int64)


def systematic_points(draws: Uint64Array, totals: Int64Array, num_draws: int) -> Int64Array:
    """Return ascending points r_k = floor((k * W + h) / N), int64[T, N], with one h in [0, W) per position.

    Over all (k, h) the number k * W + h takes every value in [0, N * W) once, so floor(. / N) hits
    every integer of [0, W) exactly N times: E[count_i] = N * w_i / W with no rounding. For one h,
    count_i is the number of multiples of W in a half-open interval of length N * w_i: the floor or
    the ceiling of N * w_i / W. (h itself is floor(u * W / 2**64): P(h < a) is within 2**-64.)

    k * W + h can exceed 64 bits; with W = q * N + rem it is k * q + floor((k * rem + h) / N).

    Args:
        draws: uint64[T, 1], u, uniform.
        totals: int64[T], W < 2**62.
        num_draws: N <= 2**16.
    """
    h = umul64hi(draws, totals.astype(np.uint64)[:, None]).astype(np.int64)
    quotient, remainder = np.divmod(totals[:, None], num_draws)
    k = np.arange(num_draws, dtype=np.int64)
    points: Int64Array = k * quotient + (k * remainder + h) // num_draws
    return points


def systematic_errors(probs: Float64Array, num_draws: int) -> Float64Array:
    """Return the sum over V of f (1 - f) / N^2, float64[T], f the fractional part of N t.

    A count is floor(N t) or one more, and N t on average: so it is one more with probability f, and its variance that
    of a coin, f (1 - f).
    """
    fraction = np.modf(num_draws * probs)[0]
    errors: Float64Array = (fraction * (1 - fraction)).sum(axis=1) / num_draws**2
    return errors


def multinomial_errors(probs: Float64Array, num_draws: float) -> Float64Array:
    """Return the sum over V of t (1 - t) / N, float64[T]: 1 - sum t^2, over N.

    A count is binomial, of N draws that hit with probability t: its variance is N t (1 - t).
    """
    errors: Float64Array = (1 - (probs**2).sum(axis=1)) / num_draws
    return errors


DRAWN = {
    "multinomial": Drawing(multinomial_points, multinomial_errors),
    "systematic": Drawing(systematic_points, systematic_errors),
}
"""Those samplers of `kinds.SAMPLERS` whose values are counts."""
