"""The visiting order is a permutation per epoch and a pure function of (seed, epoch, position)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pretrain.data.order import VisitOrder


@settings(max_examples=60, deadline=None)
@given(num_sequences=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_sequence_once(num_sequences, seed, epoch):
    order = VisitOrder(num_sequences, seed=seed)
    positions = np.arange(num_sequences, dtype=np.int64) + epoch * num_sequences
    assert np.array_equal(np.sort(order[positions]), np.arange(num_sequences))


def test_positions_may_be_asked_in_any_grouping():
    order = VisitOrder(1000, seed=9)
    whole = order[np.arange(2500)]
    pieces = np.concatenate([order[np.arange(i, i + 50)] for i in range(0, 2500, 50)])
    assert np.array_equal(whole, pieces)


def test_epochs_and_seeds_differ():
    n = 500
    order = VisitOrder(n, seed=1)
    first, second = order[np.arange(n)], order[np.arange(n, 2 * n)]
    other = VisitOrder(n, seed=2)[np.arange(n)]
    assert (first == second).mean() < 0.05
    assert (first == other).mean() < 0.05


def test_order_looks_random():
    n = 4096
    order = VisitOrder(n, seed=3)[np.arange(n)]
    correlation = np.corrcoef(np.arange(n), order)[0, 1]
    steps = np.abs(np.diff(order))
    assert abs(correlation) < 4 / np.sqrt(n)
    assert abs(steps.mean() / (n / 3) - 1) < 0.1  # of a uniform permutation


@pytest.mark.parametrize(
    ("num_sequences", "seed", "positions", "expected"),
    [
        (10, 1234, range(12), [9, 0, 7, 4, 5, 1, 3, 2, 6, 8, 8, 9]),
        (1000003, 7, [0, 1, 999999, 1000003, 5000000], [360413, 54754, 104933, 302408, 55358]),
    ],
)
def test_the_order_never_changes_between_releases(num_sequences, seed, positions, expected):
    order = VisitOrder(num_sequences, seed=seed)
    assert order[np.array(positions, dtype=np.int64)].tolist() == expected
