from __future__ import annotations

import numpy as np
import pytest

from distill_pretrain.errors import TeacherError
from distill_pretrain.sampling.weights import BadLogits, Scratch, integer_weights

POLYNOMIAL = (
    "0x1.e243bep-14",
    "-0x1.52a284p-10",
    "0x1.3a7ae4p-7",
    "-0x1.c6a66cp-5",
    "0x1.ebfbaap-3",
    "-0x1.62e430p-1",
    "0x1p+0",
)


def written_out(logits: np.ndarray) -> np.ndarray:
    """The definition in unfused float32 steps and 64-bit shifts, as a kernel computes it."""
    with np.errstate(invalid="ignore"):
        d = (logits.max(-1, keepdims=True) - logits) * np.float32(1.4426950408889634)
    inside = d < 41
    d = np.where(inside, d, np.float32(0))
    n = d.astype(np.int32)
    f = d - n.astype(np.float32)
    p = np.full_like(f, np.float32(float.fromhex(POLYNOMIAL[0])))
    for coefficient in POLYNOMIAL[1:]:
        p = p * f + np.float32(float.fromhex(coefficient))
    q = (p * np.float32(2**30)).astype(np.uint64) << np.uint64(10)
    return np.where(inside, q >> n.astype(np.uint64), np.uint64(0)).astype(np.int64)


@pytest.mark.parametrize(("rows", "vocab"), [(7, 5), (40, 4096), (3, 40000), (2, 1)])
@pytest.mark.parametrize("scale", [0.001, 4.0, 40.0])
def test_weights_are_the_written_out_definition_bit_for_bit(rows: int, vocab: int, scale: float):
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    logits[0, 1:] = -np.inf
    logits[-1, : vocab // 2] = -1e30
    assert np.array_equal(integer_weights(logits), written_out(logits))


def test_weights_at_powers_of_two_and_at_the_cutoff():
    steps = np.arange(0, 45, 0.25, dtype=np.float32) / np.float32(1.4426950408889634)
    for nudge in (-np.inf, 0, np.inf):
        logits = -(np.nextafter(steps, np.float32(nudge)) if nudge else steps)[None]
        logits = np.minimum(logits, 0).astype(np.float32)
        found = integer_weights(logits)
        assert np.array_equal(found, written_out(logits))
        assert found[0, 0] == 1 << 40 and found.min() == 0


def test_weights_are_the_softmax_to_a_millionth():
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((4, 128256)) * 3).astype(np.float32)
    exact = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    found = integer_weights(logits).astype(np.float64)
    found /= found.sum(1, keepdims=True)
    assert 0.5 * np.abs(found - exact).sum(1).max() < 1e-6


def test_weights_do_not_depend_on_batching_or_layout():
    logits = np.random.default_rng(2).standard_normal((50, 3000)).astype(np.float32)
    whole = integer_weights(logits)
    scratch = Scratch(20, 3000)
    assert np.array_equal(whole[:20], integer_weights(logits[:20], scratch))
    assert np.array_equal(whole[20:33], integer_weights(logits[20:33], scratch))
    assert np.array_equal(whole, integer_weights(np.asfortranarray(logits)))


def test_excluded_tokens_have_no_weight():
    logits = np.array([[0, -np.inf, 1]], np.float32)
    assert integer_weights(logits)[0, 1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unusable_rows_are_named(bad: float):
    logits = np.zeros((6, 9), np.float32)
    logits[4] = bad
    logits[2, 3 if np.isnan(bad) else slice(None)] = bad
    with pytest.raises(TeacherError, match="rows 2, 4") as caught:
        integer_weights(logits)
    assert isinstance(caught.value, BadLogits) and caught.value.rows == [2, 4]
