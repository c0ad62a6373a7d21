from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from cache_samples import (
    make_plan,
    make_targets,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)

from distill_pretrain.errors import CacheError
from distill_pretrain.formats import CachePlan, ShardWriter

PLAN = make_plan(num_sequences=12, seq_len=64, block_tokens=16, shard_sequences=4)
PART = "s-000001.dpt.part"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, bytes]:
    return tree(write_cache(tmp_path_factory.mktemp("reference"), PLAN))


def write_some(folder: Path, shard: int, blocks: int) -> None:
    claimed = open_writer(folder, PLAN).claim(shard)
    assert claimed is not None
    with claimed:
        append_blocks(claimed, blocks)


def append_blocks(claimed: ShardWriter, until: int) -> None:
    while claimed.next_block < until:
        sequence, offset, size = claimed.place(claimed.next_block)
        tokens = make_tokens(PLAN, sequence)[offset : offset + size]
        claimed.append(make_targets(PLAN, sequence, offset, size), tokens)


def finish(folder: Path, plan: CachePlan = PLAN) -> dict[str, bytes]:
    writer = open_writer(folder, plan)
    for shard in writer.pending():
        write_shard(writer, shard)
    writer.publish_manifest()
    return tree(folder)


def test_an_interrupted_shard_continues_where_it_stopped(tmp_path: Path, reference):
    write_some(tmp_path, 1, 7)
    claimed = open_writer(tmp_path, PLAN).claim(1)
    assert claimed is not None and claimed.next_block == 7
    claimed.close()
    assert finish(tmp_path) == reference
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "kind", ["truncated", "zeroed", "garbage", "stale page", "no header", "whole"]
)
def test_a_damaged_tail_is_cut_and_written_again(tmp_path: Path, reference, kind: str):
    draw = random.Random(kind)
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        write_some(folder, 1, 16 if kind == "whole" else draw.randrange(1, 17))
        data = bytearray((folder / PART).read_bytes())
        cut = draw.randrange(len(data))
        if kind == "truncated":
            del data[cut:]
        elif kind == "zeroed":
            data[cut:] = bytes(len(data) - cut)
        elif kind == "garbage":
            data += draw.randbytes(draw.randrange(1, 500))
        elif kind == "stale page":
            data[cut : cut + 64] = bytes(len(data[cut : cut + 64]))
        elif kind == "no header":
            del data[: cut % 256]
        elif kind == "whole":
            data += reference["s-000001.dpt"][len(data) :][: draw.randrange(1, 400)]
        (folder / PART).write_bytes(data)
        assert finish(folder) == reference


@pytest.mark.parametrize("lost", ["s-000001.json", "manifest.json"])
def test_a_finished_file_without_its_record_is_verified_and_kept(
    tmp_path: Path, reference, lost: str
):
    folder = write_cache(tmp_path / "c", PLAN)
    inode = os.stat(folder / "s-000001.dpt").st_ino
    (folder / lost).unlink()
    assert finish(folder) == reference
    assert os.stat(folder / "s-000001.dpt").st_ino == inode


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_bad_finished_file_without_record_is_set_aside(tmp_path: Path, reference, damage: str):
    folder = write_cache(tmp_path / "c", PLAN)
    (folder / "s-000001.json").unlink()
    data = bytearray((folder / "s-000001.dpt").read_bytes())
    if damage == "flip":
        data[700] ^= 4
    else:
        del data[700:]
    (folder / "s-000001.dpt").write_bytes(data)
    assert finish(folder) == reference
    assert (folder / "s-000001.bad").read_bytes() == bytes(data)


def test_a_finished_file_shorter_than_its_record_is_captured_again(tmp_path: Path, reference):
    folder = write_cache(tmp_path / "c", PLAN)
    os.truncate(folder / "s-000001.dpt", 700)
    assert open_writer(folder, PLAN).pending() == [1]
    assert finish(folder) == reference


def test_a_vanished_file_is_captured_again(tmp_path: Path, reference):
    folder = write_cache(tmp_path / "c", PLAN)
    (folder / "s-000001.dpt").unlink()
    assert open_writer(folder, PLAN).pending() == [1]
    assert finish(folder) == reference


def test_a_shard_has_one_owner(tmp_path: Path):
    writer = open_writer(tmp_path, PLAN)
    claimed = writer.claim(1)
    assert claimed is not None
    assert writer.claim(1) is None
    assert open_writer(tmp_path, PLAN).claim(1) is None
    # An attempt in this process must not have dropped the lock that others respect.
    child = os.fork()
    if child == 0:
        os._exit(0 if open_writer(tmp_path, PLAN).claim(1) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    claimed.close()
    again = writer.claim(1)
    assert again is not None
    again.close()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_lock_on_a_file_that_lost_its_name_is_no_ownership(
    tmp_path: Path, reference, monkeypatch, finished: bool, replaced: bool
):
    """Between our open and our lock, the owner before us finishes the shard, or drops it."""
    writer = open_writer(tmp_path, PLAN)
    real = fcntl.lockf
    calls = []

    def late(fd: int, flags: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / PART).unlink()
            if replaced:
                (tmp_path / PART).touch()
            if finished:
                for name in ("s-000001.dpt", "s-000001.json"):
                    (tmp_path / name).write_bytes(reference[name])
        real(fd, flags)

    monkeypatch.setattr(fcntl, "lockf", late)
    assert write_shard(writer, 1) is not finished
    monkeypatch.undo()
    assert finish(tmp_path) == reference
    assert not list(tmp_path.glob("*.bad"))  # nothing was published under a name not owned


def race(folder: str, seed: int) -> None:
    draw = random.Random(seed)
    writer = open_writer(Path(folder), PLAN)
    while pending := writer.pending():
        shard = draw.choice(pending)
        write_shard(writer, shard, pause=lambda: time.sleep(draw.random() * 0.0006))
    writer.publish_manifest()


def test_killed_and_racing_writers_leave_the_same_bytes(tmp_path: Path, reference):
    fork = multiprocessing.get_context("fork")
    draw = random.Random(5)
    kills = attempt = 0
    while kills < 20:
        attempt += 1
        assert attempt <= 200, "the writers finish before they can be killed"
        folder = tmp_path / str(attempt)
        folder.mkdir()
        while True:
            workers = [
                fork.Process(target=race, args=(str(folder), draw.randrange(1 << 30)))
                for _ in range(draw.choice([1, 2, 3]))
            ]
            for worker in workers:
                worker.start()
            time.sleep(draw.random() * 0.06)
            unharmed = []
            for worker in workers:
                worker.kill()
                worker.join()
                kills += worker.exitcode == -signal.SIGKILL
                unharmed.append(worker.exitcode == 0)
                assert worker.exitcode in (0, -signal.SIGKILL)
            if any(unharmed):
                break
        assert tree(folder) == reference


def test_two_writers_at_once_share_the_work(tmp_path: Path, reference):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=race, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert tree(tmp_path) == reference
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path: Path, reference):
    failures = 0
    for limit in [100, 300, *range(800, 6000, 900)]:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                finish(tmp_path)
            except CacheError as error:
                named = str(tmp_path) in str(error) and "finished blocks are kept" in str(error)
                os._exit(3 if named else 4)
            except BaseException:
                os._exit(5)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 3)
        failures += code == 3
    assert failures >= 3
    assert finish(tmp_path) == reference


def test_a_failed_fsync_keeps_only_what_an_earlier_one_confirmed(
    tmp_path: Path, reference, monkeypatch
):
    writer = open_writer(tmp_path, PLAN)
    claimed = writer.claim(1)
    assert claimed is not None
    real, calls = os.fsync, []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CacheError, match="Input/output error"):
        append_blocks(claimed, claimed.num_blocks)
    monkeypatch.undo()
    again = writer.claim(1)
    assert again is not None and again.next_block == 4
    again.close()
    assert finish(tmp_path) == reference
