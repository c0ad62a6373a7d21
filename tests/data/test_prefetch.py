"""Reading ahead changes nothing but the waiting; errors come at their step; no thread is left behind."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distill_pretrain.data.batches import BatchSource, StudentBatches, micro_batches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.errors import CacheCorrupt
from tests.support.layouts import WalkPlan, WalkTargets


class Watched(StudentBatches):
    """Notes which steps were prepared, by which threads; damaged at one step."""

    def __init__(self, bad_step=None):
        plan = WalkPlan()
        super().__init__(
            [BatchSource(plan=plan, cache=WalkTargets(plan), num_sequences=48)],
            seed=4,
            global_batch_size=4,
            micro_batch_size=2,
            data_rank=0,
            data_size=1,
            device=torch.device("cpu"),
        )
        self.bad_step = bad_step
        self.prepared = []
        self.threads = set()

    def host_batches(self, step, with_targets):
        self.prepared.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.bad_step:
            raise CacheCorrupt("a block is damaged", where=f"step {step}")
        return super().host_batches(step, with_targets)


def prefetched(batches, steps, depth):
    return PrefetchedBatches(batches, steps=steps, depth=depth, with_targets=True)


def threads_left():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 7])
def test_the_batches_are_those_of_the_synchronous_path(depth, first):
    batches = Watched()
    with prefetched(batches, range(first, 12), depth) as source:
        found = [source.host_batches(step) for step in range(first, 12)]
    assert batches.prepared == list(range(first, 12)), "each step once, none beyond the last"
    assert batches.threads == {threading.current_thread().name} if depth == 0 else {"prefetch_0"}
    assert not threads_left()
    for step, batch in zip(range(first, 12), found, strict=True):
        expected = Watched().step_batches(step, with_targets=True)
        (moved,) = micro_batches(batch, torch.device("cpu"), readers=1)
        for a, b in zip(moved, expected, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.targets.ids, b.targets.ids)
            assert torch.equal(a.targets.probs, b.targets.probs)


def test_a_micro_batch_goes_to_the_device_when_it_is_taken_and_once_for_all_readers():
    moved: list[int] = []

    class Batch:
        def __init__(self, number):
            self.number = number

        def to(self, device):
            moved.append(self.number)
            return object()

    first, second = micro_batches([Batch(n) for n in range(3)], torch.device("cpu"), readers=2)
    assert moved == []
    taken = next(first)
    assert moved == [0] and next(second) is taken and moved == [0]
    rest = list(second)
    assert moved == [0, 1, 2] and list(first) == rest


def test_the_thread_reads_ahead_by_the_depth_and_no_further():
    batches = Watched()
    with prefetched(batches, range(100), 3) as source:
        wait_for(lambda: len(batches.prepared) == 3)
        source.host_batches(0)
        wait_for(lambda: len(batches.prepared) == 4)
        time.sleep(0.05)
        assert batches.prepared == [0, 1, 2, 3]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_at_the_step_it_belongs_to(depth):
    with prefetched(Watched(bad_step=3), range(10), depth) as source:
        for step in range(3):
            source.host_batches(step)
        with pytest.raises(CacheCorrupt, match="step 3"):
            source.host_batches(3)
    assert not threads_left()


def test_an_error_of_the_loop_ends_the_thread():
    batches = Watched()

    def loop():
        with prefetched(batches, range(10), 2) as source:
            source.host_batches(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert not threads_left()
    assert max(batches.prepared) <= 2
