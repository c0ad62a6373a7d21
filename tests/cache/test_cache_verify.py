from __future__ import annotations

from pathlib import Path

import pytest

from distill_pretrain.cache import CacheReader, VerifyResult, verify_cache
from distill_pretrain.cache.recompress import recompress_cache
from distill_pretrain.cache.verify import repair_cache
from tests.support.cache_samples import (
    Cache,
    make_plan,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)

LARGER = make_plan(num_sequences=50)


def verify(folder: Path, *, quick: bool = False) -> VerifyResult:
    return verify_cache(folder, lambda s: make_tokens(LARGER, s), quick=quick)


def flip(path: Path, place: int = 310) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def extended(cache: Cache) -> Cache:
    """A finished cache of 5 sequences, and shard 3 of a capture of 50 that was stopped."""
    writer = open_writer(cache.folder, LARGER)
    assert write_shard(writer, 3)
    return cache


def test_an_unfinished_extension_is_a_note(extended: Cache):
    result = verify(extended.folder)
    assert (result.problems, result.damaged) == ((), ())
    assert result.shards_checked == 4
    (note,) = result.notes
    assert "covers 5 of 50 sequences" in note
    assert "not captured: sequences 4 to 5, 8 to 49" in note


def test_a_damaged_short_shard_is_found_and_set_aside_while_an_extension_is_pending(
    extended: Cache,
):
    before = tree(extended.folder)
    flip(extended.folder / "s-000002-n1.dpt")
    result = verify(extended.folder)
    assert result.damaged_shards == (2,)
    assert result.recapture == ((4, 4),)
    repair_cache(extended.folder, result)
    assert (extended.folder / "s-000002-n1.bad").exists()
    lost = {"manifest.json", "s-000002-n1.dpt", "s-000002-n1.json"}
    assert set(tree(extended.folder)) == set(before) - lost
    assert tree(write_cache(extended.folder, extended.plan)) == before


def test_damage_in_an_extension_leaves_the_finished_cache_usable(extended: Cache):
    flip(extended.folder / "s-000003.dpt")
    result = verify(extended.folder)
    assert (result.damaged_shards, result.recapture) == ((3,), ((6, 7),))
    repair_cache(extended.folder, result)
    assert (extended.folder / "s-000003.bad").exists()
    assert verify(extended.folder).problems == ()
    with CacheReader.open(extended.folder) as reader:
        assert reader.plan.num_sequences == 5


def test_without_extent_and_manifest_the_names_of_the_shards_count(cache: Cache):
    (cache.folder / "extent.json").unlink()
    (cache.folder / "manifest.json").write_text("{}")
    result = verify(cache.folder)
    assert result.shards_checked == 3
    assert result.damaged == ()
    flip(cache.folder / "s-000002-n1.dpt")
    assert verify(cache.folder).damaged_shards == (2,)


@pytest.mark.parametrize("codec", ["raw", "hc", "own"])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_a_sound_shard_without_a_record_is_a_note(
    tmp_path: Path, cache: Cache, codec: str, finished: bool, quick: bool
):
    folder = cache.folder
    if codec != "raw":
        folder = tmp_path / "hc"
        recompress_cache(cache.folder, folder, pilot_tokens=100)
    if codec == "own":
        use_own_tables(tmp_path, cache.folder, folder)
    (folder / "s-000001.json").unlink()
    if not finished:
        (folder / "manifest.json").unlink()
    result = verify(folder, quick=quick)
    assert result.damaged == ()
    assert "shard 1: no done record, but the file is sound" in result.notes[0]
    assert len(result.problems) == (not finished)
    flip(folder / "s-000001.dpt")
    result = verify(folder, quick=quick)
    assert (result.damaged_shards, result.notes) == ((1,), ())


def use_own_tables(tmp_path: Path, raw: Path, folder: Path) -> None:
    """Put shard 1, coded with other tables than the plan's, into a cache without a manifest."""
    from distill_pretrain.cache.finished_shards import FinishedShards
    from distill_pretrain.cache.reader import load_plan_of_extent
    from distill_pretrain.cache.writer import CacheWriter
    from distill_pretrain.files.storage import open_storage

    recompress_cache(raw, tmp_path / "narrow", pilot_tokens=1)
    storage = open_storage(tmp_path / "narrow")
    narrow = FinishedShards(storage, load_plan_of_extent(storage))
    tables = narrow.codecs.get(narrow.plan.codec_sha256).tables  # type: ignore[attr-defined]
    writer = CacheWriter.create_or_resume(folder, load_plan_of_extent(open_storage(folder)))
    writer.discard(1)
    claimed = writer.claim(1, choose_tables=lambda: tables)
    assert claimed is not None
    with claimed, narrow.open(1) as file:
        for block, frame in enumerate(file.frames(0, claimed.num_blocks)):
            claimed.append_hashed(file.spec.decode(frame, block), frame.token_hash)
        claimed.finish()
    writer.publish_manifest()
