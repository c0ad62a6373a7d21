"""A blend takes its sources by weight, position by position, in closed form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.data.blend import BlendOrder, blend_splits
from distill_pretrain.data.order import VisitOrder
from distill_pretrain.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


def order(weights, sizes=None):
    return BlendOrder(sizes or [50 + 7 * n for n in range(len(weights))], weights, seed=3)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 2**60))
def test_every_stretch_holds_the_shares_of_the_weights(weights, first):
    """Counted from 0 to n, source j is within j + 1 of its share; checked around any n."""
    sources, places = order(weights).split(first + np.arange(400, dtype=np.int64))
    left = Fraction(1)
    for number, split in enumerate(blend_splits(weights)):
        share = left * Fraction(split, 1 << 32)
        left -= share
        for at in np.flatnonzero(sources == number):
            taken = int(places[at]) + 1
            assert abs(taken - (first + int(at) + 1) * share) <= number + 1
        assert abs(share - Fraction(weights[number]) / sum(map(Fraction, weights))) < Fraction(
            len(weights), 1 << 32
        )


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_every_source_is_counted_through_without_gap(weights):
    sources, places = order(weights).split(np.arange(3000, dtype=np.int64))
    for number in range(len(weights)):
        assert np.array_equal(
            places[sources == number], np.arange(np.count_nonzero(sources == number))
        )


def test_positions_may_be_asked_in_any_grouping():
    blend = order([0.5, 0.2, 0.3])
    whole = blend[np.arange(1200)]
    pieces = [blend[np.arange(i, i + 40)] for i in range(0, 1200, 40)]
    for column in range(2):
        assert np.array_equal(whole[column], np.concatenate([piece[column] for piece in pieces]))


@pytest.mark.parametrize(
    ("first", "count"), [(0, 5), (4090, 6), (4090, 7), (4095, 8200), (8192, 1)]
)
def test_a_span_is_the_positions_it_names(first, count):
    blend = order([0.5, 0.2, 0.3])
    for _ in range(2):
        for found, wanted in zip(
            blend.span(first, count), blend[np.arange(first, first + count)], strict=True
        ):
            assert np.array_equal(found, wanted)


def test_every_source_has_epochs_of_its_own():
    blend = order([2, 1], sizes=[30, 10])
    sources, sequences = blend[np.arange(90)]
    for number, (epochs, size) in enumerate([(2, 30), (3, 10)]):
        mine = sequences[sources == number]
        assert len(mine) == epochs * size
        for epoch in mine.reshape(epochs, size):
            assert sorted(epoch) == list(range(size))


def test_sources_of_equal_size_are_not_visited_in_step():
    sources, sequences = order([1, 1], sizes=[500, 500])[np.arange(1000)]
    assert (sequences[sources == 0] == sequences[sources == 1]).mean() < 0.05


def test_one_source_is_its_visiting_order():
    positions = np.arange(200, dtype=np.int64)
    sources, sequences = BlendOrder([70], [0.1], seed=9)[positions]
    assert not sources.any()
    assert np.array_equal(sequences, VisitOrder(70, seed=9)[positions])


def test_only_the_ratios_of_weights_count():
    assert blend_splits([7, 2, 1]) == blend_splits([14, 4, 2])
    assert blend_splits([0.25, 0.75]) == (1 << 30, 1 << 32)


@pytest.mark.parametrize("weights", [[1.0, 1e-12], [1e-12, 1.0]])
def test_a_weight_that_would_never_be_visited_is_refused(weights):
    with pytest.raises(ConfigError, match="never be visited"):
        blend_splits(weights)


@pytest.mark.parametrize(
    ("first", "sources", "sequences"),
    [
        (0, [2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0], [1, 9, 5, 0, 4, 7, 12, 4, 4, 5, 3, 1]),
        (10**15, [2, 0, 1, 0, 2, 0], [2, 9, 2, 5, 3, 6]),
    ],
)
def test_the_blend_never_changes_between_releases(first, sources, sequences):
    blend = BlendOrder([10, 20, 5], [0.5, 0.3, 0.2], seed=1234)
    found = blend[first + np.arange(len(sources), dtype=np.int64)]
    assert found[0].tolist() == sources
    assert found[1].tolist() == sequences
