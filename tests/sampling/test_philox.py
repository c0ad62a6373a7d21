from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.sampling.philox import draws64, philox4x32, umul64hi

words = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_random123_s_known_answers(key, counter, expected: str):
    found = philox4x32(key, np.array(counter, np.uint32))
    assert " ".join(f"{word:08x}" for word in found) == expected


def test_draws_are_words_of_the_named_counter():
    seed, position = 0xDEADBEEF12345678, (5 << 32) + 7
    found = draws64(seed, 9, np.array([position], np.uint64), 5)[0]
    block = philox4x32((0x12345678, 0xDEADBEEF), np.array([7, 5, 2, 9], np.uint32)).tolist()
    assert found[4] == block[0] | block[1] << 32
    block = philox4x32((0x12345678, 0xDEADBEEF), np.array([7, 5, 1, 9], np.uint32)).tolist()
    assert found[3] == block[2] | block[3] << 32


def test_fewer_draws_are_a_prefix_and_streams_differ():
    positions = np.arange(4, dtype=np.uint64)
    assert np.array_equal(draws64(1, 0, positions, 9)[:, :4], draws64(1, 0, positions, 4))
    assert not np.any(draws64(1, 0, positions, 4) == draws64(1, 1, positions, 4))


@settings(deadline=None)
@given(words, words)
def test_umul64hi_is_the_upper_half_of_the_product(a: int, b: int):
    found = umul64hi(np.array([a], np.uint64), np.array([b], np.uint64))
    assert int(found[0]) == a * b >> 64
