from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache import CachePlan, CacheReader, CacheWriter, verify_cache
from distill_pretrain.cache import merge as cache_merge
from distill_pretrain.cache.finished_shards import FinishedShards
from distill_pretrain.cache.manifest import extent_bytes
from distill_pretrain.cache.merge import merge_caches
from distill_pretrain.cache.reader import load_plan_of_extent
from distill_pretrain.cache.recompress import recompress_cache
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch
from distill_pretrain.files.storage import open_storage
from tests.support.cache_samples import (
    Cache,
    make_plan,
    make_targets,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)

PLAN = make_plan(num_sequences=9)


def write_shards(folder: Path, shards: list[int], plan: CachePlan = PLAN) -> Path:
    writer = open_writer(folder, plan)
    for shard in shards:
        write_shard(writer, shard)
    return folder


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.dpt")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tree(write_cache(tmp_path_factory.mktemp("whole"), PLAN))


@pytest.fixture
def halves(tmp_path: Path) -> list[Path]:
    return [write_shards(tmp_path / "a", [0, 2, 4]), write_shards(tmp_path / "b", [1, 3])]


def test_halves_become_the_cache_that_one_capture_writes(tmp_path: Path, halves, whole):
    result = merge_caches(tmp_path / "c", halves)
    assert tree(tmp_path / "c") == whole
    assert (result.linked, result.copied, result.missing) == (5, 0, ())
    assert result.manifest is not None
    assert inodes(tmp_path / "c") == {**inodes(halves[0]), **inodes(halves[1])}
    assert not list((tmp_path / "c").glob("*.part"))
    again = merge_caches(tmp_path / "c", halves)
    assert (again.linked, again.manifest) == (0, result.manifest)


def test_without_hard_links_the_files_are_copied(
    tmp_path: Path, halves, whole, monkeypatch: pytest.MonkeyPatch
):
    def refused(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    # publish_bytes_once falls back to a rename, too.
    monkeypatch.setattr(os, "link", refused)
    result = merge_caches(tmp_path / "c", halves)
    assert (result.linked, result.copied) == (0, 5)
    assert tree(tmp_path / "c") == whole
    assert not set(inodes(tmp_path / "c").values()) & set(inodes(halves[0]).values())


def test_a_copied_file_is_compared_with_its_record(
    tmp_path: Path, halves, monkeypatch: pytest.MonkeyPatch
):
    path = halves[1] / "s-000003.dpt"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(cache_merge, "_link", lambda *args: False)
    with pytest.raises(CacheCorrupt, match=f"{halves[1]}/s-000003.dpt"):
        merge_caches(tmp_path / "c", halves)
    assert not (tmp_path / "c" / "s-000003.dpt").exists()
    assert not list((tmp_path / "c").glob(".*.tmp"))


def test_sources_in_a_store_are_copied(tmp_path: Path, halves, whole):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for path in halves[1].iterdir():
        files.pipe_file(f"/merge/{path.name}", path.read_bytes())
    result = merge_caches(tmp_path / "c", [halves[0], "memory://merge"])
    files.rm("/merge", recursive=True)
    assert (result.linked, result.copied) == (3, 2)
    assert tree(tmp_path / "c") == whole


def test_a_cache_is_extended_in_place(tmp_path: Path, whole):
    dest = write_cache(tmp_path / "a", make_plan(num_sequences=5))
    before = inodes(dest)
    more = write_shards(tmp_path / "b", [2, 3, 4])
    result = merge_caches(dest, [more])
    assert result.plan.num_sequences == 9 and result.manifest is not None
    assert {name: tree(dest)[name] for name in whole} == whole
    after = inodes(dest)
    assert all(after[name] == before[name] for name in ("s-000000.dpt", "s-000001.dpt"))
    assert after["s-000002.dpt"] == inodes(more)["s-000002.dpt"]


def test_missing_shards_are_reported_and_the_rest_stays(tmp_path: Path, halves, whole):
    (halves[1] / "s-000003.json").unlink()
    result = merge_caches(tmp_path / "c", halves)
    assert (result.manifest, result.missing, result.missing_shards) == (None, ((6, 7),), 1)
    assert len(inodes(tmp_path / "c")) == 4
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert write_shard(open_writer(tmp_path / "c", PLAN), 3)
    assert merge_caches(tmp_path / "c", halves).manifest is not None
    assert tree(tmp_path / "c") == whole


def test_the_extent_can_be_chosen(tmp_path: Path, halves):
    shutil.copytree(halves[0], tmp_path / "d")
    fewer = merge_caches(tmp_path / "c", halves, num_sequences=8)
    assert fewer.manifest is not None and fewer.manifest.plan.num_sequences == 8
    more = merge_caches(tmp_path / "d", halves, num_sequences=12)
    assert more.missing == ((8, 11),)
    with pytest.raises(CacheError, match="num_sequences is 0"):
        merge_caches(tmp_path / "e", halves, num_sequences=0)


def test_a_merge_of_fewer_sequences_leaves_a_larger_manifest(tmp_path: Path, halves, whole):
    merge_caches(tmp_path / "c", halves)
    fewer = merge_caches(tmp_path / "c", halves, num_sequences=4)
    assert fewer.manifest is not None and fewer.manifest.plan.num_sequences == 9
    assert tree(tmp_path / "c") == whole


def test_a_manifest_is_enough_where_the_done_records_were_not_copied(tmp_path: Path, whole):
    source = write_cache(tmp_path / "a", PLAN)
    for path in source.glob("s-*.json"):
        path.unlink()
    merge_caches(tmp_path / "c", [source])
    assert tree(tmp_path / "c") == whole


def test_two_versions_of_a_shard_are_refused(tmp_path: Path, halves):
    other = open_writer(tmp_path / "other", PLAN)
    claimed = other.claim(2)
    assert claimed is not None
    with claimed:
        while claimed.next_block < claimed.num_blocks:
            sequence, offset, size = claimed.place(claimed.next_block)
            tokens = make_tokens(PLAN, sequence)[offset : offset + size]
            claimed.append(make_targets(PLAN, sequence + 1, offset, size), tokens)
        claimed.finish()
    with pytest.raises(CacheMismatch, match=r"shard 2 \(sequences 4 to 5\)") as caught:
        merge_caches(tmp_path / "c", [*halves, tmp_path / "other"])
    assert str(halves[0]) in str(caught.value) and str(tmp_path / "other") in str(caught.value)
    assert not (tmp_path / "c").exists()
    with pytest.raises(CacheMismatch, match="shard 2"):  # the destination counts as well
        merge_caches(tmp_path / "other", halves)


def test_other_plans_are_refused_field_by_field(tmp_path: Path, halves):
    teacher = {"kind": "test", "weights": "f" * 64}
    other = write_shards(
        tmp_path / "other", [0], make_plan(num_sequences=9, teacher=teacher, micro_batch_size=4)
    )
    for dest, sources in ((tmp_path / "c", [halves[0], other]), (other, halves)):
        before = tree(other)
        with pytest.raises(CacheMismatch) as caught:
            merge_caches(dest, sources)
        assert "micro_batch_size: found" in str(caught.value)
        assert "teacher.weights: found" in str(caught.value)
        assert not (tmp_path / "c").exists()
        assert tree(other) == before


def test_mistakes_are_named(tmp_path: Path, halves):
    with pytest.raises(CacheError, match="also one to read"):
        merge_caches(halves[0], [tmp_path / "x" / ".." / "a"])
    with pytest.raises(CacheIncomplete, match=f"no cache here; where: {tmp_path}/nothing"):
        merge_caches(tmp_path / "c", [*halves, tmp_path / "nothing"])
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot be written"):
        merge_caches(tmp_path / "file" / "c", halves)


def test_tables_come_along(tmp_path: Path, whole):
    raw = write_cache(tmp_path / "raw", PLAN)
    recompress_cache(raw, tmp_path / "hc", pilot_tokens=50)
    expected = tree(tmp_path / "hc")
    # A shard with tables of its own.
    with_own = make_own_tables(tmp_path, raw)
    halves = [tmp_path / "h0", tmp_path / "h1"]
    for number, half in enumerate(halves):
        shutil.copytree(tmp_path / "hc", half)
        (half / "manifest.json").unlink()
        for shard in range(PLAN.num_shards):
            if shard % 2 != number:
                for path in half.glob(f"s-{shard:06d}*"):
                    path.unlink()
    merge_caches(tmp_path / "c", halves)
    assert tree(tmp_path / "c") == expected
    merge_caches(tmp_path / "d", [with_own])
    assert tree(tmp_path / "d") == tree(with_own)
    assert verify_cache(tmp_path / "d", lambda s: make_tokens(PLAN, s)).problems == ()


def make_own_tables(tmp_path: Path, raw: Path) -> Path:
    """A copy of the hc cache, shard 1 coded with tables fitted to one sequence."""
    recompress_cache(raw, tmp_path / "narrow", pilot_tokens=1)
    folder = tmp_path / "own"
    shutil.copytree(tmp_path / "hc", folder)
    storage = open_storage(tmp_path / "narrow")
    narrow = FinishedShards(storage, load_plan_of_extent(storage))
    tables = narrow.codecs.get(narrow.plan.codec_sha256).tables  # type: ignore[attr-defined]
    storage = open_storage(folder)
    writer = CacheWriter.create_or_resume(folder, load_plan_of_extent(storage))
    writer.discard(1)
    (folder / "s-000001.bad").unlink()
    claimed = writer.claim(1, choose_tables=lambda: tables)
    assert claimed is not None
    with claimed, narrow.open(1) as file:
        for block, frame in enumerate(file.frames(0, claimed.num_blocks)):
            claimed.append_hashed(file.spec.decode(frame, block), frame.token_hash)
        claimed.finish()
    assert len({record.codec_sha256 for record in writer.publish_manifest().shards}) == 2
    return folder


def merge_slowly(dest: Path, sources: list[Path]) -> None:
    real = cache_merge.fsync_path

    def slow(path: Path) -> None:
        time.sleep(0.004)
        real(path)

    cache_merge.fsync_path = slow
    merge_caches(dest, sources)


def test_killed_at_any_time_it_goes_on(tmp_path: Path, halves, whole):
    fork = multiprocessing.get_context("fork")
    kills = 0
    for attempt in range(12):
        dest, delay = tmp_path / f"killed-{attempt}", 0.004 + 0.004 * attempt
        while not (dest / "manifest.json").exists():
            worker = fork.Process(target=merge_slowly, args=(dest, halves))
            worker.start()
            time.sleep(delay)
            worker.kill()
            worker.join()
            assert worker.exitcode in (0, -signal.SIGKILL)
            kills += worker.exitcode != 0
            delay *= 1.5
        assert tree(dest) == whole
        assert not list(dest.glob("*.part"))
    assert kills >= 6


def test_the_lock_file_of_a_merge_killed_at_its_last_moment_goes(tmp_path: Path, halves, whole):
    merge_caches(tmp_path / "c", halves)
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "s-000001.dpt.part").touch()
    (tmp_path / "c" / "s-999999.dpt.part").write_bytes(b"of a larger capture")
    merge_caches(tmp_path / "c", halves)
    assert [p.name for p in (tmp_path / "c").glob("*.part")] == ["s-999999.dpt.part"]


@pytest.mark.parametrize("lost", ["s-000002.json", "s-000004-n1.json"])
def test_a_linked_shard_whose_record_is_not_there_yet_gets_the_sources(
    tmp_path: Path, halves, whole, lost: str
):
    merge_caches(tmp_path / "c", halves)
    (tmp_path / "c" / lost).unlink()
    (tmp_path / "c" / "manifest.json").unlink()
    merge_caches(tmp_path / "c", halves)
    assert tree(tmp_path / "c") == whole


def test_a_shard_that_someone_is_writing_is_left_to_them(tmp_path: Path, halves, whole):
    writer = open_writer(tmp_path / "c", PLAN)
    owned = writer.claim(3)
    assert owned is not None
    assert merge_caches(tmp_path / "c", halves).missing == ((6, 7),)
    owned.close()
    assert merge_caches(tmp_path / "c", halves).missing == ()
    assert tree(tmp_path / "c") == whole


# Extension by capturing more, without a merge.


def test_more_sequences_keep_full_shards_and_supersede_a_short_one(tmp_path: Path, whole):
    small = make_plan(num_sequences=5)
    folder = write_cache(tmp_path / "c", small)
    before = inodes(folder)
    assert set(before) == {"s-000000.dpt", "s-000001.dpt", "s-000002-n1.dpt"}
    old = tree(folder)

    writer = open_writer(folder, PLAN)
    assert writer.pending() == [2, 3, 4]
    for shard in (2, 3):
        write_shard(writer, shard)
        with CacheReader.open(folder) as reader:  # still the cache of five sequences
            assert reader.manifest.to_json_bytes() == old["manifest.json"]
            for sequence in range(5):
                found = reader.read(sequence, make_tokens(PLAN, sequence))
                expected = make_targets(PLAN, sequence, 0, PLAN.seq_len)
                assert np.array_equal(found.ids, expected.ids)
    with pytest.raises(CacheIncomplete, match="8 to 8"):
        writer.publish_manifest()
    write_shard(writer, 4)
    writer.publish_manifest()

    assert {name: inodes(folder)[name] for name in before} == before
    assert {name: tree(folder)[name] for name in whole} == whole
    assert verify_cache(folder, lambda s: make_tokens(PLAN, s)).problems == ()
    with CacheReader.open(folder) as reader:
        assert reader.plan.num_sequences == 9


def test_an_unfinished_extension_is_told_from_a_finished_cache(cache: Cache):
    writer = open_writer(cache.folder, PLAN)
    write_shard(writer, 2)
    storage = open_storage(cache.folder)
    shards = FinishedShards(storage, load_plan_of_extent(storage))
    assert list(shards.records) == [0, 1, 2]
    assert shards.plan.num_sequences == 9
    assert shards.manifest is not None and shards.manifest.plan.num_sequences == 5
    result = verify_cache(cache.folder, lambda s: make_tokens(PLAN, s))
    assert result.problems == ()
    assert "covers 5 of 9 sequences" in result.notes[0]
    assert "not captured: sequences 6 to 8" in result.notes[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("asked", [50, 1 << 40])
@pytest.mark.parametrize("finished", [False, True])
def test_what_was_only_asked_for_is_not_the_extent_of_the_merged_cache(
    tmp_path: Path, halves, whole, asked: int, finished: bool
):
    if finished:
        write_cache(halves[1], PLAN)
    for folder in halves:
        (folder / "extent.json").write_bytes(extent_bytes(asked))
    result = merge_caches(tmp_path / "c", halves)
    assert result.missing == ()
    assert tree(tmp_path / "c") == whole
    larger = merge_caches(tmp_path / "d", halves, num_sequences=asked)
    assert larger.missing == ((8, asked - 1),)
    assert larger.missing_shards == asked // 2 - 4


def test_a_manifest_counts_though_its_shards_are_lost(tmp_path: Path, whole):
    source = write_cache(tmp_path / "a", PLAN)
    for path in source.glob("s-000004*"):
        path.unlink()
    assert merge_caches(tmp_path / "c", [source]).missing == ((8, 8),)
