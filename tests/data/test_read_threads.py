"""Targets of a step read by several threads: the same batches, whatever thread is done first, and errors in order."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from distill_pretrain.data.batches import BatchSource, HostBatch, StudentBatches
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.errors import CacheCorrupt, CacheUnreadable
from tests.support.layouts import WalkPlan, WalkTargets


class Store(WalkTargets):
    """Answers after a time that differs from read to read; some sequences fail."""

    def __init__(self, plan, errors=None):
        super().__init__(plan)
        self.errors = errors or {}
        self.threads = set()
        self.reading = self.most = 0
        self.lock = threading.Lock()
        self.asked = []

    def read(self, sequence, tokens, start=0, stop=None):
        with self.lock:
            self.threads.add(threading.current_thread().name.partition("_")[0])
            self.asked.append(sequence)
            self.reading += 1
            self.most = max(self.most, self.reading)
        try:
            time.sleep(random.uniform(0, 0.004))
            if sequence in self.errors:
                raise self.errors[sequence]
            return super().read(sequence, tokens, start, stop)
        finally:
            with self.lock:
                self.reading -= 1


def batches(store, threads, **options):
    return StudentBatches(
        [BatchSource(plan=store.plan, cache=store, num_sequences=48)],
        seed=4,
        global_batch_size=12,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
        device=torch.device("cpu"),
        read_threads=threads,
        **options,
    )


def tensors(batch: HostBatch) -> list[torch.Tensor]:
    moved = batch.to(torch.device("cpu"))
    return [moved.tokens, moved.labels, moved.targets.ids, moved.targets.probs]


@pytest.mark.parametrize("context_rank", [0, 1])
@pytest.mark.parametrize("depth", [0, 2])
def test_the_batches_are_those_of_one_thread(depth, context_rank):
    context = {"context_rank": context_rank, "context_size": 2}
    alone, store = Store(WalkPlan()), Store(WalkPlan())
    expected = [batches(alone, 1, **context).host_batches(step, True) for step in range(3)]
    assert alone.threads == {"MainThread"} and alone.most == 1
    ours = batches(store, 8, **context)
    with PrefetchedBatches(ours, steps=range(3), depth=depth, with_targets=True) as source:
        found = [source.host_batches(step) for step in range(3)]
    assert store.threads == {"read"}
    assert 4 < store.most <= 8, "the micro-batches of a step are read together"
    assert not [t for t in threading.enumerate() if t.name.startswith(("read", "prefetch"))]
    for step, theirs in zip(found, expected, strict=True):
        for one, other in zip(step, theirs, strict=True):
            for a, b in zip(tensors(one), tensors(other), strict=True):
                assert torch.equal(a, b)


def test_the_first_failure_in_the_order_is_raised_and_no_read_goes_on():
    order = batches(Store(WalkPlan()), 1)
    step = [s for number in range(6) for s in order.sequences(0, number)[1].tolist()]
    errors = {step[number]: CacheCorrupt(f"sequence {step[number]}") for number in (3, 5, 11)}
    store = Store(WalkPlan(), errors)
    ours = batches(store, 4)
    with pytest.raises(CacheCorrupt, match=f"sequence {step[3]}"):
        ours.host_batches(0, True)
    assert store.reading == 0 and len(store.asked) < len(step)
    asked = len(store.asked)
    time.sleep(0.02)
    assert len(store.asked) == asked
    store.errors = {}
    ours.host_batches(0, True)
    ours.close()


def test_every_thread_tries_failing_reads_again(monkeypatch):
    from distill_pretrain.data.retry import read_with_retries

    waits = []
    monkeypatch.setitem(read_with_retries.__kwdefaults__, "sleep", waits.append)
    store = Store(WalkPlan())
    left = set(range(48))

    class Failing(Store):
        def read(self, sequence, *args):
            if sequence in left:
                left.discard(sequence)
                raise CacheUnreadable("no answer")
            return super().read(sequence, *args)

    ours = batches(Failing(store.plan), 4, read_retry_s=60.0)
    expected = batches(store, 1).host_batches(0, True)
    for one, other in zip(ours.host_batches(0, True), expected, strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert torch.equal(a, b)
    assert waits == [0.5] * 12
    ours.close()


def test_reads_from_urls_take_several_threads_by_default(tmp_path: Path):
    def threads(**changes):
        return DataConfig(tokens=tmp_path / "t", seq_len=8, **changes).threads_to_read

    assert threads() == threads(cache="runs/cache") == 1
    assert threads(cache="s3://bucket/cache") == 8
    assert threads(held_out_cache="simplecache::s3://bucket/cache") == 8
    other = {"tokens": tmp_path / "u", "cache": "gs://bucket/cache", "weight": 1}
    assert threads(cache="runs/cache", blend=(other,)) == 8
    assert threads(cache="s3://bucket/cache", read_threads=1) == 1
    assert threads(cache="runs/cache", read_threads=3) == 3
