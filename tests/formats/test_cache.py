from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from cache_samples import (
    Cache,
    make_labels,
    make_plan,
    make_targets,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_pretrain.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
)
from distill_pretrain.formats import CachePlan, CacheReader, CacheWriter, verify_cache


def read_all(cache: Cache) -> None:
    with CacheReader.open(cache.folder, max_open=1) as reader:
        for sequence in range(cache.plan.num_sequences):
            reader.read(sequence, make_tokens(cache.plan, sequence))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_tokens": 12},
        {"shard_sequences": 100},
        {"sampler": {**make_plan().sampler, "num_draws": 300}},
        {"sampler": {**make_plan().sampler, "name": "topk"}, "codec": 2},
    ],
)
def test_targets_come_back_as_written(tmp_path: Path, changes: dict):
    plan = make_plan(**changes)
    write_cache(tmp_path / "c", plan)
    with CacheReader.open(tmp_path / "c", max_open=2) as reader:
        assert reader.plan == plan
        for sequence in [4, 0, 3, 1, 2, 0]:
            found = reader.read(sequence, make_tokens(plan, sequence))
            expected = make_targets(plan, sequence, 0, plan.seq_len)
            assert np.array_equal(found.entries_per_token, expected.entries_per_token)
            assert np.array_equal(found.ids, expected.ids)
            if plan.codec == 1:
                assert np.array_equal(found.values, expected.values)
            assert found.entries_per_token.shape == (plan.seq_len,)
    assert verify_cache(tmp_path / "c", lambda s: make_tokens(plan, s)).problems == ()


def test_the_bytes_of_a_shard_never_change(cache: Cache):
    digests = {
        name: hashlib.sha256(data).hexdigest()[:16] for name, data in tree(cache.folder).items()
    }
    assert digests == GOLDEN_DIGESTS


GOLDEN_DIGESTS = {
    "manifest.json": "7cfa0995e7e8d294",
    "plan.json": "3fd62dd7637b0437",
    "s-000000.dpt": "2e936c30f2ad2781",
    "s-000000.json": "2c6c8372ce5105b8",
    "s-000001.dpt": "954472c8bc6868a1",
    "s-000001.json": "f1291cf2f37c5576",
    "s-000002.dpt": "ee78144b1f24a107",
    "s-000002.json": "39668e7784488ee7",
}


def test_the_header_is_as_specified(cache: Cache):
    data = (cache.folder / "s-000001.dpt").read_bytes()
    head = data[:256]
    assert head[:8] == b"\x89DPT\r\n\x1a\n"
    assert struct.unpack_from("<HHI", head, 8) == (1, 0, 0x01020304)
    assert struct.unpack_from("<III", head, 16) == (256, 5, 300)
    assert struct.unpack_from("<HH", head, 28) == (7, 1)
    assert struct.unpack_from("<QQQ", head, 32) == (2, 24, 6)
    assert head[56:88].hex() == cache.plan.plan_id
    assert head[88:252] == bytes(164)
    assert struct.unpack_from("<I", head, 252)[0] == zlib.crc32(head[:252])
    assert data[256:260] == b"BLK1"
    assert struct.unpack_from("<Q8s", data, len(data) - 16) == (len(data), b"DPT.END\0")


def test_every_flipped_bit_of_a_shard_is_detected(tmp_path: Path):
    plan = make_plan(num_sequences=1, seq_len=6, block_tokens=4, shard_sequences=1)
    cache = Cache(write_cache(tmp_path / "c", plan), plan)
    path = cache.folder / "s-000000.dpt"
    whole = path.read_bytes()
    with CacheReader.open(cache.folder) as reader:
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit >> 3] ^= 1 << (bit & 7)
            path.write_bytes(damaged)
            reader.close()  # the next read opens the shard anew
            with pytest.raises(CacheCorrupt):
                reader.read(0, make_tokens(plan, 0))


def test_every_truncation_of_a_shard_is_detected(cache: Cache):
    path = cache.folder / "s-000001.dpt"
    whole = path.read_bytes()
    with CacheReader.open(cache.folder) as opened_before:
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(CacheCorrupt):
                CacheReader.open(cache.folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(CacheCorrupt):
            opened_before.read(2, make_tokens(cache.plan, 2))


def test_a_shard_that_shrinks_while_open_is_detected(cache: Cache):
    with CacheReader.open(cache.folder) as reader:
        reader.read(0, make_tokens(cache.plan, 0))
        with open(cache.folder / "s-000000.dpt", "r+b") as file:
            file.truncate(300)
        with pytest.raises(CacheCorrupt, match="cut off"):
            reader.read(0, make_tokens(cache.plan, 0))


def test_swapped_shards_are_detected(tmp_path: Path):
    plan = make_plan(num_sequences=4)
    folder = write_cache(tmp_path / "c", plan)
    (folder / "s-000000.dpt").replace(tmp_path / "x")
    (folder / "s-000001.dpt").replace(folder / "s-000000.dpt")
    (tmp_path / "x").replace(folder / "s-000001.dpt")
    with pytest.raises(CacheError):
        read_all(Cache(folder, plan))


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_every_flipped_byte_of_plan_and_manifest_is_detected(cache: Cache, name: str):
    path = cache.folder / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            read_all(cache)


def test_recomputed_checksums_are_caught_by_verify(cache: Cache):
    """A block replaced by another valid one has sound checksums; only the sha256 tells."""
    other = make_plan()
    twisted = cache.folder.parent / "twisted"
    writer = open_writer(twisted, other)
    claimed = writer.claim(0)
    assert claimed is not None
    while claimed.next_block < claimed.num_blocks:
        sequence, offset, size = claimed.place(claimed.next_block)
        tokens = make_tokens(other, sequence)[offset : offset + size]
        claimed.append(make_targets(other, sequence + 1, offset, size), tokens)
    claimed.finish()
    shutil.copy(twisted / "s-000000.dpt", cache.folder / "s-000000.dpt")
    result = verify_cache(cache.folder, lambda s: make_tokens(cache.plan, s))
    assert result.damaged_shards == (0,)
    assert any("sha256" in problem for problem in result.problems)


def test_one_changed_token_names_its_block(cache: Cache):
    tokens = make_tokens(cache.plan, 3)
    tokens[7] += 1
    named = r"shard 1, block 4 \(sequence 3, offset 5\)"
    with CacheReader.open(cache.folder) as reader, pytest.raises(CacheMismatch, match=named):
        reader.read(3, tokens)


def test_shifted_tokens_are_refused(cache: Cache):
    with CacheReader.open(cache.folder) as reader:
        with pytest.raises(CacheMismatch, match="tokens differ from those the teacher saw"):
            reader.read(3, np.roll(make_tokens(cache.plan, 3), 1))
        with pytest.raises(CacheMismatch, match="expected: 0 to 4"):
            reader.read(5, make_tokens(cache.plan, 5))


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ({"tokens": {"bin_sha256": "x", "idx_sha256": "c" * 64}}, "another corpus.*data.tokens"),
        ({"tokenizer_sha256": "x"}, "another tokenizer"),
        ({"vocab_size": 299}, "another vocabulary.*300, the run 299"),
        ({"seq_len": 13}, "another seq_len.*12, the run 13.*data.seq_len"),
        ({"sequence_plan_id": "x"}, "order of documents.*data.seed"),
        ({"num_sequences": 6}, "has 5, the run needs 6"),
    ],
)
def test_a_cache_of_something_else_is_named(cache: Cache, run: dict, named: str):
    good = {
        "tokens": cache.plan.tokens,
        "tokenizer_sha256": cache.plan.tokenizer_sha256,
        "vocab_size": 300,
        "seq_len": 12,
        "sequence_plan_id": cache.plan.sequence_plan_id,
        "num_sequences": 5,
    }
    with CacheReader.open(cache.folder) as reader:
        reader.check_matches(**good)
        with pytest.raises(CacheMismatch, match=named):
            reader.check_matches(**{**good, **run})


def test_all_differences_are_listed_at_once(cache: Cache):
    with CacheReader.open(cache.folder) as reader, pytest.raises(CacheMismatch) as caught:
        reader.check_matches(seq_len=1, vocab_size=2, tokenizer_sha256="x")
    for name in ("seq_len", "vocabulary", "tokenizer"):
        assert name in str(caught.value)


def test_a_missing_shard_names_its_sequences_at_open(cache: Cache):
    (cache.folder / "s-000001.dpt").unlink()
    with pytest.raises(CacheIncomplete, match=r"s-000001\.dpt: sequences 2 to 3"):
        CacheReader.open(cache.folder)


def test_an_unfinished_cache_names_the_missing_sequences(tmp_path: Path):
    plan = make_plan(num_sequences=10)
    writer = open_writer(tmp_path, plan)
    for shard in (0, 3):
        write_shard(writer, shard)
    assert writer.pending() == [1, 2, 4]
    for attempt in (writer.publish_manifest, lambda: CacheReader.open(tmp_path)):
        with pytest.raises(CacheIncomplete, match="2 to 5, 8 to 9"):
            attempt()
    with pytest.raises(CacheIncomplete, match="no cache here"):
        CacheReader.open(tmp_path / "nothing")


def test_verify_reports_every_problem(tmp_path: Path):
    plan = make_plan(num_sequences=12)
    folder = write_cache(tmp_path / "c", plan)
    data = bytearray((folder / "s-000001.dpt").read_bytes())
    data[300] ^= 1
    (folder / "s-000001.dpt").write_bytes(data)
    (folder / "s-000002.dpt").unlink()
    (folder / "s-000005.json").write_text("{}")
    seen = []
    result = verify_cache(
        folder, lambda s: make_tokens(plan, s) + (s == 8), lambda *at: seen.append(at)
    )
    assert result.damaged_shards == (1, 2, 4, 5)
    assert result.recapture == ((2, 5), (8, 11))
    assert len(result.problems) >= 5
    assert seen[-1] == (6, 6)


def test_discarded_shards_are_captured_again_to_the_same_bytes(cache: Cache):
    before = tree(cache.folder)
    writer = open_writer(cache.folder, cache.plan)
    writer.discard(1)
    with pytest.raises(CacheIncomplete, match="2 to 3"):
        CacheReader.open(cache.folder)
    assert write_shard(writer, 1)
    writer.publish_manifest()
    assert tree(cache.folder) == before


def test_the_manifest_counts_what_was_written(cache: Cache):
    plan = cache.plan
    labelled = hits = entries = 0
    for sequence in range(plan.num_sequences):
        targets = make_targets(plan, sequence, 0, plan.seq_len)
        rows = np.split(targets.ids, np.cumsum(targets.entries_per_token)[:-1])
        entries += len(targets.ids)
        for label, ids in zip(make_labels(plan, sequence), rows, strict=True):
            labelled += label != -100 and len(ids) > 0
            hits += label in ids
    totals = json.loads((cache.folder / "manifest.json").read_bytes())["totals"]
    assert (totals["tokens"], totals["entries"]) == (60, entries)
    assert (totals["labelled"], totals["label_hits"]) == (labelled, hits)
    assert totals["bytes"] == sum(p.stat().st_size for p in cache.folder.glob("*.dpt"))


def test_another_plan_in_the_folder_is_refused_field_by_field(cache: Cache):
    before = tree(cache.folder)
    other = make_plan(teacher={"kind": "test", "weights": "f" * 64}, micro_batch_size=4)
    with pytest.raises(CacheMismatch) as caught:
        CacheWriter.create_or_resume(cache.folder, other)
    assert "micro_batch_size: found 2, expected 4" in str(caught.value)
    assert "teacher.weights: found 'ee" in str(caught.value)
    assert tree(cache.folder) == before


def test_equal_plans_have_equal_ids_and_any_change_another():
    plan = make_plan()
    assert CachePlan.from_json_bytes(plan.to_json_bytes()) == plan
    assert make_plan().plan_id == plan.plan_id
    assert make_plan(micro_batch_size=3).plan_id != plan.plan_id


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 1},
        {"vocab_size": (1 << 20) + 1},
        {"seq_len": 0},
        {"codec": 2},
        {"codec": True},
        {"sampler": {**make_plan().sampler, "temperature": 0.5}},
        {"sampler": {**make_plan().sampler, "num_draws": 1025}},
        {"sampler": {"name": "topk"}},
        {"tokens": None},
    ],
)
def test_an_impossible_plan_is_refused(changes: dict):
    with pytest.raises(CacheError, match="invalid"):
        make_plan(**changes)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_hostile_shards_only_raise_cache_errors(tmp_path_factory, data):
    """Bytes changed and every checksum recomputed: no crash, no other exception."""
    plan = make_plan(num_sequences=1, shard_sequences=1)
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        write_cache(folder, plan)
        shutil.copy(folder / "s-000000.dpt", folder / "sound")
    whole = bytearray((folder / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    (folder / "s-000000.dpt").write_bytes(_with_sound_checksums(whole))
    try:
        read_all(Cache(folder, plan))
    except CacheError:
        return


def _with_sound_checksums(data: bytearray) -> bytes:
    footer = len(data) - 40
    index = struct.unpack_from("<Q", data, footer)[0]
    if index < footer:
        struct.pack_into("<I", data, footer + 16, zlib.crc32(data[index:footer]))
        for row in range(index, footer - 31, 32):
            offset, length = struct.unpack_from("<QI", data, row)
            if length >= 48 and offset + length <= len(data):
                crc = zlib.crc32(data[offset : offset + length - 8])
                struct.pack_into("<I", data, offset + length - 8, crc)
        struct.pack_into("<I", data, footer + 16, zlib.crc32(data[index:footer]))
    tail = bytes(data[footer : footer + 20]) + bytes(data[footer + 24 :])
    struct.pack_into("<I", data, footer + 20, zlib.crc32(tail))
    struct.pack_into("<I", data, 252, zlib.crc32(data[:252]))
    return bytes(data)
