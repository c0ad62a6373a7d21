"""Integer weights w_j = floor(2**40 * softmax_j / max softmax) from float32 logits.

Integers add up to the same total in any order, so nothing drawn from them depends on tiling, on
batching or on how a vocabulary is split over devices. Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import TeacherError

WEIGHT_BITS = 40
_LOG2E = np.float32(1.4426950408889634)
# Minimax polynomial of 2**-f on [0, 1), highest power first; the constant term is 1. Scaling by
# 2**40 is exact in float32, so the rounded steps are those of the unscaled polynomial.
_COEFFICIENTS = tuple(
    np.float32(float.fromhex(c) * 2.0**WEIGHT_BITS)
    for c in (
        "0x1.e243bep-14",
        "-0x1.52a284p-10",
        "0x1.3a7ae4p-7",
        "-0x1.c6a66cp-5",
        "0x1.ebfbaap-3",
        "-0x1.62e430p-1",
        "0x1p+0",
    )
)
_CUTOFF_BITS = np.float32(WEIGHT_BITS + 1).view(np.int32)
# Three float32 scratch tiles and the int64 output tile stay inside a 1 MiB L2 cache.
_TILE_ELEMENTS = 32768

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


class BadLogits(TeacherError):
    """Some rows have no softmax.

    Attributes:
        rows: their numbers in the logits handed in.
    """

    def __init__(self, rows: list[int]) -> None:
        shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        super().__init__(
            f"the teacher's logits are unusable in {len(rows)} row(s)",
            where=f"rows {shown}",
            found="NaN, +inf, or nothing but -inf",
            expected="finite logits (-inf for excluded tokens)",
            remedy="check the teacher's weights and its dtype (overflow in half precision)",
        )
        self.rows = rows


def row_maxima(logits: Float32Array) -> Float32Array:
    """Return the largest logit of each row of float32[T, V], float32[T].

    Raises:
        BadLogits: a row holds NaN or +inf, or nothing but -inf.
    """
    return usable_maxima(largest(logits))


def largest(logits: Float32Array) -> Float32Array:
    """Return the same as `row_maxima`, float32[T], but +inf for a row that holds NaN."""
    maxima: Float32Array = logits.max(axis=1)
    maxima[np.isnan(maxima)] = np.inf
    return maxima


def usable_maxima(maxima: Float32Array) -> Float32Array:
    """Return the same maxima, unless one of them is not finite.

    Raises:
        BadLogits: numbers the rows.
    """
    bad = np.flatnonzero(~np.isfinite(maxima))
    if len(bad):
        raise BadLogits(bad.tolist())
    return maxima


def log_sums(totals: Int64Array) -> npt.NDArray[np.float64]:
    """Return the log of the sum of exp(z - max z), float64[T], from the totals of the integer weights.

    It does not depend on who adds them up, and is within 1e-6 of the exact one: the weights are cut to 2**-40 and their
    polynomial is one of float32.
    """
    sums: npt.NDArray[np.float64] = np.log(totals.astype(np.float64) / 2.0**WEIGHT_BITS)
    return sums


class Scratch:
    """Buffers that `integer_weights` reuses from call to call: fresh pages cost more than the maths.

    Args:
        num_rows: most rows of a call.
        vocab: V.
    """

    def __init__(self, num_rows: int, vocab: int) -> None:
        self.weights = np.empty((num_rows, vocab), np.int64)
        self.tiles = np.empty((3, min(num_rows * vocab, _TILE_ELEMENTS)), np.float32)


def integer_weights(
    logits: Float32Array, scratch: Scratch | None = None, maxima: Float32Array | None = None
) -> Int64Array:
    """Return weights in [0, 2**40], int64[T, V], of logits float32[T, V]; -inf gives 0, the maximum 2**40.

    d = (max - z) * log2(e), n = floor(d), f = d - n, w = floor(2**(40 - n) * poly(f)), with every
    float32 operation rounded on its own (no fused multiply-add). exp(z - max) is 2**-n * 2**-f: the first factor is
    exact in binary, and the second lies in (1/2, 1], where a polynomial of degree 6 is as good as float32.

    The result lies in `scratch` when that is given, until its next use. `maxima` are the `row_maxima`, if known.

    Raises:
        BadLogits: see `row_maxima`.
    """
    num_rows, vocab = logits.shape
    scratch = Scratch(num_rows, vocab) if scratch is None else scratch
    maxima = row_maxima(logits) if maxima is None else maxima
    weights = scratch.weights[:num_rows]
    rows = max(1, min(num_rows, _TILE_ELEMENTS // vocab))
    columns = min(vocab, _TILE_ELEMENTS)
    for row in range(0, num_rows, rows):
        for column in range(0, vocab, columns):
            tile = logits[row : row + rows, column : column + columns]
            out = weights[row : row + rows, column : column + columns]
            _weigh_tile(tile, maxima[row : row + rows, None], scratch.tiles[:, : tile.size], out)
    return weights


def _weigh_tile(
    logits: Float32Array, maxima: Float32Array, tiles: Float32Array, out: Int64Array
) -> None:
    power, whole, value = (buffer.reshape(logits.shape) for buffer in tiles)
    np.subtract(maxima, logits, out=power)
    np.multiply(power, _LOG2E, out=power)
    # From 41 binary orders down the weight is 0; the clamp makes it so without a mask. Floats >= 0
    # sort as their bit patterns do, and the integer minimum is four times as fast.
    order = power.view(np.int32)
    np.minimum(order, _CUTOFF_BITS, out=order)
    np.floor(power, out=whole)
    np.subtract(power, whole, out=power)
    np.multiply(power, _COEFFICIENTS[0], out=value)
    for coefficient in _COEFFICIENTS[1:-1]:
        np.add(value, coefficient, out=value)
        np.multiply(value, power, out=value)
    np.add(value, _COEFFICIENTS[-1], out=value)
    # Dividing by 2**n is an integer subtraction in the exponent field: exact, and cheap.
    shift = power.view(np.int32)
    np.copyto(shift, whole, casting="unsafe")
    np.left_shift(shift, 23, out=shift)
    bits = value.view(np.int32)
    np.subtract(bits, shift, out=bits)
    np.copyto(out, value, casting="unsafe")
