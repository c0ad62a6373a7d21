from __future__ import annotations

import errno
import fcntl
import json
import os
import random
from pathlib import Path

import pytest

from distill_pretrain.cache import CachePlan, CacheWriter, ShardWriter
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.errors import CacheCorrupt, CacheError
from tests.support.cache_samples import (
    make_plan,
    make_tables,
    make_targets,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)

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


def test_a_damaged_read_back_is_named_and_the_shard_written_anew(
    tmp_path: Path, reference, monkeypatch
):
    """What was written is not what comes back: the descriptor is closed once, the next run starts over."""
    writer = open_writer(tmp_path, PLAN)
    real = os.replace

    def damaging(source: Path, target: Path) -> None:
        if str(target).endswith(".dpt"):
            with open(source, "r+b") as file:
                file.write(b"not a header")
        real(source, target)

    monkeypatch.setattr(os, "replace", damaging)
    with pytest.raises(CacheCorrupt, match="header is damaged"):
        write_shard(writer, 1)
    monkeypatch.undo()
    assert writer.pending() == [0, 1, 2]
    assert finish(tmp_path) == reference


def test_the_slower_of_two_starters_uses_the_tables_of_the_faster(tmp_path: Path):
    plan = make_plan(codec=3)

    def too_late() -> HcTables:
        write_cache(tmp_path, plan)
        other = [make_targets(plan, 3, 0, plan.seq_len)]
        return build_tables(other, kind="counts", num_draws=plan.num_draws, vocab_size=300)

    writer = CacheWriter.create_or_resume(tmp_path, plan, make_tables=too_late)
    assert writer.plan.codec_sha256 == make_tables(plan).sha256
    assert writer.pending() == []


def test_a_manifest_never_shrinks_and_extents_only_grow(tmp_path: Path):
    """The smaller job looked before the larger one published."""
    small, large = (make_plan(num_sequences=n) for n in (4, 8))
    late = open_writer(tmp_path, small)
    write_cache(tmp_path, large)
    assert late.publish_manifest().plan.num_sequences == 8
    assert json.loads((tmp_path / "manifest.json").read_bytes())["num_sequences"] == 8
    open_writer(tmp_path, small)
    assert json.loads((tmp_path / "extent.json").read_bytes()) == {"num_sequences": 8}


def test_a_finished_cache_is_looked_at_without_a_write(tmp_path: Path, reference, monkeypatch):
    assert finish(tmp_path) == reference
    (tmp_path / ".plan.json.1.ab.tmp").touch()
    os.utime(tmp_path / ".plan.json.1.ab.tmp", (0, 0))
    real = os.open

    def read_only(path, flags, *more, **named):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **named)

    def refuse(path, *_: object, **__: object):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "unlink", refuse)
    assert finish(tmp_path) == reference
    larger = make_plan(num_sequences=16, seq_len=64, block_tokens=16, shard_sequences=4)
    with pytest.raises(CacheError, match=r"cannot be written.*Read-only file system"):
        open_writer(tmp_path, larger)


def test_a_full_disk_says_how_much_is_left(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    claimed = open_writer(tmp_path, PLAN).claim(1)
    assert claimed is not None
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match=r"No space left on device, [\d,]+ bytes free"):
        append_blocks(claimed, 1)
