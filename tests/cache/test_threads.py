"""Many threads read one cache at once, and get what one alone gets."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.open_shards import OpenShards
from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheUnreadable
from tests.support.cache_samples import (
    make_plan,
    make_tables,
    make_targets,
    make_tokens,
    write_cache,
)

THREADS = 16
ROUNDS = int(os.environ.get("DISTILL_PRETRAIN_THREAD_ROUNDS", "4"))
SETTINGS = {"num_sequences": 8, "seq_len": 60, "block_tokens": 16, "shard_sequences": 2}


@pytest.fixture
def rapid_switches() -> Iterator[None]:
    """Threads take turns every microsecond, not every 5 milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(works: list[Callable[[], object]]) -> list[object]:
    """Results of functions that as many threads begin together."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], object]) -> object:
        barrier.wait(60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


def as_bytes(targets: RaggedTargets) -> list[bytes]:
    return [getattr(targets, name).tobytes() for name in ("entries_per_token", "ids", "values")]


@pytest.mark.parametrize("codec", ["raw", "hc"])
@pytest.mark.parametrize("max_open", [1, 3, 256])
def test_threads_read_the_same_and_different_shards_as_one_alone_does(
    tmp_path: Path, rapid_switches: None, codec: str, max_open: int
):
    plan = make_plan(**SETTINGS)
    if codec == "hc":
        plan = make_plan(**SETTINGS, codec=3, codec_sha256=make_tables(plan).sha256)
    folder = write_cache(tmp_path / "cache", plan)
    tokens = [make_tokens(plan, sequence) for sequence in range(plan.num_sequences)]
    with CacheReader.open(folder) as alone:
        expected = [as_bytes(alone.read(s, tokens[s])) for s in range(plan.num_sequences)]
        all_bytes, head = alone.bytes_read, alone.head

    for number in range(ROUNDS):
        # A reader that has read nothing yet: whatever is made on first use is made by all threads at once.
        with CacheReader.of(head, max_open=max_open) as reader:

            def read(thread: int, reader: CacheReader = reader, number: int = number) -> None:
                order = np.random.default_rng(number // 2 * (thread % 2)).permutation(len(tokens))
                for sequence in order.tolist():
                    found = as_bytes(reader.read(sequence, tokens[sequence]))
                    assert found == expected[sequence], (number, thread, sequence)

            before = len(os.listdir("/proc/self/fd"))
            at_once([lambda t=thread: read(t) for thread in range(THREADS)])
            assert reader.bytes_read == THREADS * all_bytes
            assert len(os.listdir("/proc/self/fd")) - before <= max_open, "files left open"


def test_threads_that_decode_with_new_tables_do_not_free_what_another_one_decodes_with(
    rapid_switches: None,
):
    """From Python 3.12 on a cached property has no lock: what one thread made is freed when another stores its own."""
    plan = make_plan(**SETTINGS)
    stored, targets = make_tables(plan).to_bytes(), make_targets(plan, 1, 0, plan.seq_len)
    payload = HcCodec(HcTables.from_bytes(stored)).encode(targets)
    shape = len(targets.entries_per_token), len(targets.ids)
    expected = as_bytes(HcCodec(HcTables.from_bytes(stored)).decode(payload, *shape))
    for _ in range(10 * ROUNDS):
        codec = HcCodec(HcTables.from_bytes(stored))
        decoded = at_once([lambda c=codec: as_bytes(c.decode(payload, *shape))] * THREADS)
        assert decoded == [expected] * THREADS
        codec = HcCodec(HcTables.from_bytes(stored))
        assert at_once([lambda c=codec: c.encode(targets)] * THREADS) == [payload] * THREADS


class File:
    """Stands for a ShardFile."""

    def __init__(self) -> None:
        self.is_open = True

    def close(self) -> None:
        assert self.is_open, "closed twice"
        self.is_open = False


def test_a_file_that_is_given_up_while_it_is_read_is_closed_by_its_last_reader():
    opened: list[File] = []

    def open_shard(shard: int) -> File:
        opened.append(File())
        return opened[-1]

    shards = OpenShards(open_shard, most=1)  # type: ignore[arg-type]
    with shards.use(0) as first:
        with shards.use(0) as again, shards.use(1) as second:
            assert again is first and first.is_open and second.is_open
        assert first.is_open, "its first reader is not done"
        shards.close()
        assert first.is_open and not second.is_open
    assert not first.is_open
    with pytest.raises(CacheUnreadable), shards.use(0):
        raise CacheUnreadable("stale")
    with shards.use(0):
        pass
    assert len(opened) == 4, "a failed read opens the file anew"
    assert [file.is_open for file in opened] == [False, False, False, True]


def test_a_shard_is_opened_once_and_different_shards_at_the_same_time():
    """Opening may take several answers of a store: threads wait for one another only over the same shard."""
    together = threading.Barrier(4)
    opened: list[int] = []

    def open_shard(shard: int) -> File:
        opened.append(shard)
        together.wait(60)
        return File()

    shards = OpenShards(open_shard, most=8)  # type: ignore[arg-type]

    def use(shard: int) -> None:
        with shards.use(shard):
            pass

    at_once([lambda s=thread % 4: use(s) for thread in range(12)])
    assert sorted(opened) == [0, 1, 2, 3]


def test_a_shard_that_cannot_be_opened_is_tried_again():
    failures = [CacheUnreadable("no answer")]

    def open_shard(shard: int) -> File:
        if failures:
            raise failures.pop()
        return File()

    shards = OpenShards(open_shard, most=1)  # type: ignore[arg-type]
    with pytest.raises(CacheUnreadable, match="no answer"), shards.use(0):
        pass
    with shards.use(0) as file:
        assert file.is_open
