"""Reads that fail for a while are tried again and change nothing; those that keep failing end with the file's name."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.data import retry
from distill_pretrain.data.batches import BatchSource, StudentBatches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.data.retry import read_with_retries
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheUnreadable
from tests.support.cache_samples import make_plan, make_tokens, write_cache
from tests.support.notices import noted

PLAN = make_plan(num_sequences=8)


class Sequences:
    """The corpus of `cache_samples`, as a plan gives it."""

    num_sequences, seq_len = PLAN.num_sequences, PLAN.seq_len

    def read(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.stack([make_tokens(PLAN, sequence) for sequence in sequences.tolist()])
        return tokens, np.roll(tokens, -1, axis=1)


def batches(reader: CacheReader, retry_s: float) -> StudentBatches:
    return StudentBatches(
        [BatchSource(plan=Sequences(), cache=reader, num_sequences=PLAN.num_sequences)],
        seed=4,
        global_batch_size=4,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
        device=torch.device("cpu"),
        read_retry_s=retry_s,
    )


class Disk:
    """os.pread that fails so many times, with an error of a disk or a network file system."""

    def __init__(self, failures: int, number: int) -> None:
        self.failures, self.number = failures, number
        self.pread = os.pread

    def __call__(self, fd: int, length: int, offset: int) -> bytes:
        if self.failures and offset:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.pread(fd, length, offset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "cache", PLAN)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time, and is noted."""
    noted: list[float] = []
    monkeypatch.setitem(read_with_retries.__kwdefaults__, "sleep", noted.append)
    return noted


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_failure_that_passes_changes_no_target(folder, waits, monkeypatch, number):
    expected = [
        b
        for step in range(4)
        for b in batches(CacheReader.open(folder), 0).step_batches(step, with_targets=True)
    ]
    reader = CacheReader.open(folder)
    source = batches(reader, 60.0)
    first = source.step_batches(0, with_targets=True)
    disk = Disk(3, number)
    monkeypatch.setattr(os, "pread", disk)
    with (
        noted() as said,
        PrefetchedBatches(source, steps=range(1, 4), depth=2, with_targets=True) as ahead,
    ):
        read = [batch for step in range(1, 4) for batch in ahead.host_batches(step)]
    assert disk.failures == 0 and waits == [0.5, 1.0, 2.0]
    found = first + [batch.to(torch.device("cpu")) for batch in read]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.targets.ids, theirs.targets.ids)
        assert torch.equal(ours.targets.probs, theirs.targets.probs)
    assert len(said) == 3 and all("WARNING" in line and ".dpt" in line for line in said)


def test_a_lasting_failure_ends_with_the_file_and_leaves_no_thread(folder, waits, monkeypatch):
    source = batches(CacheReader.open(folder), 60.0)
    monkeypatch.setattr(os, "pread", Disk(10**9, errno.EIO))
    with (
        PrefetchedBatches(source, steps=range(4), depth=2, with_targets=True) as ahead,
        pytest.raises(CacheUnreadable, match=r"cannot be read; where: .*\.dpt; found: OSError"),
    ):
        ahead.host_batches(0)
    assert waits[:7] == [0.5, 1, 2, 4, 8, 16, 28.5], "waits double until 60 s are over"
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize(
    "error", [CacheCorrupt("a block is damaged"), CacheError("no permission"), KeyError("bug")]
)
def test_what_would_be_found_again_is_not_tried_again(waits, error):
    def read() -> None:
        raise error

    with pytest.raises(type(error)):
        read_with_retries(read, retry_s=60)
    assert waits == []


def test_permissions_are_no_passing_failure(folder, waits, monkeypatch):
    reader = CacheReader.open(folder)
    reader.read(0, make_tokens(PLAN, 0))
    monkeypatch.setattr(os, "pread", Disk(1, errno.EACCES))
    with pytest.raises(CacheError, match="PermissionError") as caught:
        reader.read(0, make_tokens(PLAN, 0))
    assert not isinstance(caught.value, CacheUnreadable)


def test_no_retries_tries_once(waits):
    attempts = []

    def read() -> None:
        attempts.append(1)
        raise CacheUnreadable("the cache cannot be read", where="x.dpt")

    with pytest.raises(CacheUnreadable):
        read_with_retries(read, retry_s=0)
    assert len(attempts) == 1 and waits == []
    assert retry.FIRST_WAIT_S > 0


def test_bytes_read_are_those_of_the_blocks_that_were_read(folder):
    reader = CacheReader.open(folder)
    source = batches(reader, 0)
    assert source.bytes_read == 0
    for step in range(2):  # an epoch: every sequence once
        source.step_batches(step, with_targets=True)
    frames = sum(
        int(reader._open_shard(shard).index["length"].sum()) for shard in range(PLAN.num_shards)
    )
    assert source.bytes_read == frames > 0
    source.step_batches(2, with_targets=False)
    assert source.bytes_read == frames
