from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache import CachePlan, CacheReader, CacheWriter, verify_cache
from distill_pretrain.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
)
from distill_pretrain.files.atomic import canonical_json
from tests.support.cache_samples import (
    Cache,
    by_id,
    make_labels,
    make_plan,
    make_targets,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)


@pytest.fixture(params=[1, 3])
def any_cache(request, tmp_path: Path) -> Cache:
    plan = make_plan(codec=request.param)
    return Cache(write_cache(tmp_path / "cache", plan), plan)


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
        {"codec": 3},
        {"codec": 3, "sampler": {**make_plan().sampler, "num_draws": 300}},
        {"sampler": {**make_plan().sampler, "name": "topk"}, "codec": 4},
    ],
)
def test_targets_come_back_as_written(tmp_path: Path, changes: dict):
    plan = make_plan(**changes)
    write_cache(tmp_path / "c", plan)
    with CacheReader.open(tmp_path / "c", max_open=2) as reader:
        assert plan.joining(reader.plan) == reader.plan
        for sequence in [4, 0, 3, 1, 2, 0]:
            found = reader.read(sequence, make_tokens(plan, sequence))
            expected = make_targets(plan, sequence, 0, plan.seq_len)
            assert found.entries_per_token.shape == (plan.seq_len,)
            # Log-probabilities of whole nats are stored exactly.
            assert by_id(found) == by_id(expected)
            for start, stop in ((0, 1), (3, 9), (5, 10), (11, 12)):
                part = reader.read(sequence, make_tokens(plan, sequence), start, stop)
                assert by_id(part) == by_id(expected)[start:stop]
    assert verify_cache(tmp_path / "c", lambda s: make_tokens(plan, s)).problems == ()


@pytest.mark.parametrize("codec", [1, 3])
def test_the_bytes_of_a_cache_never_change(tmp_path: Path, codec: int):
    folder = write_cache(tmp_path / "c", make_plan(codec=codec))
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in tree(folder).items()}
    assert digests == GOLDEN_DIGESTS[codec]


GOLDEN_DIGESTS = {
    1: {
        "extent.json": "def6c5b7be5add9e",
        "manifest.json": "3902d6fe19602442",
        "plan.json": "09bd217e9be26690",
        "s-000000.dpt": "184637cbb03d077e",
        "s-000000.json": "5a5b770168380ce6",
        "s-000001.dpt": "b74b55bc5908216a",
        "s-000001.json": "981da81de577476b",
        "s-000002-n1.dpt": "0aa564d40a6a4391",
        "s-000002-n1.json": "0df1ac68e81860c3",
    },
    3: {
        "codec-9dedbfc3f3bb1b002be1563a8117b6d5252a2ddd91ae1a02d5326d16647f8ce6.bin": "9dedbfc3f3bb1b00",
        "extent.json": "def6c5b7be5add9e",
        "manifest.json": "ad6d7b6131ec2fc7",
        "plan.json": "583c2dc69afc5a17",
        "s-000000.dpt": "a42791c5fc5ab4ee",
        "s-000000.json": "87aaf3fb5d0ca2f3",
        "s-000001.dpt": "9b76e0e47f339896",
        "s-000001.json": "17da5d16b1811ccd",
        "s-000002-n1.dpt": "d3c050f07d0d1519",
        "s-000002-n1.json": "9e85a00e9db77cc2",
    },
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


@pytest.mark.parametrize("codec", [1, 3])
def test_every_flipped_bit_of_a_shard_is_detected(tmp_path: Path, codec: int):
    plan = make_plan(num_sequences=1, seq_len=6, block_tokens=4, shard_sequences=1, codec=codec)
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
    named = r"wrong size; where: .*s-000001\.dpt, sequences 2 to 3"
    with CacheReader.open(cache.folder) as reader:
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(CacheCorrupt, match=named):
                reader.read(2, make_tokens(cache.plan, 2))
        path.write_bytes(whole + b"x")
        with pytest.raises(CacheCorrupt, match=named):
            reader.read(3, make_tokens(cache.plan, 3))
        path.write_bytes(whole)
        reader.read(2, make_tokens(cache.plan, 2))


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


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "codec-*.bin"])
def test_every_flipped_byte_of_plan_manifest_and_tables_is_detected(tmp_path: Path, name: str):
    plan = make_plan(codec=3)
    cache = Cache(write_cache(tmp_path / "cache", plan), plan)
    (path,) = cache.folder.glob(name)
    whole = path.read_bytes()
    for position in range(0, len(whole), 1 + len(whole) // 1000):
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


def test_of_the_same_ids_the_name_of_the_tokenizer_is_no_difference(cache: Cache):
    other = replace(cache.plan, tokenizer_sha256="x")
    assert other.joining(cache.plan) == cache.plan
    elsewhere = replace(other, tokens={**other.tokens, "bin_sha256": "x"})
    assert elsewhere.joining(cache.plan).tokenizer_sha256 == "x"
    with CacheReader.open(cache.folder) as reader:
        reader.check_matches(tokens=cache.plan.tokens, tokenizer_sha256="x")
        with pytest.raises(CacheMismatch, match="another tokenizer"):
            reader.check_matches(tokens=elsewhere.tokens, tokenizer_sha256="x")


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


def test_a_damaged_extent_costs_no_time_and_a_foreign_digest_is_no_path(tmp_path: Path):
    plan = make_plan(codec=3)
    folder = write_cache(tmp_path / "c", plan)
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "extent.json").write_bytes(canonical_json({"num_sequences": 1 << 40}))
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheIncomplete, match=r"sequences 4 to 1099511627775"):
        CacheReader.open(folder)
    assert "sequences 4 to" in verify_cache(folder).problems[1]
    digest = json.loads(manifest)["shards"][0]["codec_sha256"]
    for foreign in ("../../" + digest[6:], "\0" * 64, digest.upper()):
        values = json.loads(manifest)
        values["shards"][0]["codec_sha256"] = foreign
        (folder / "manifest.json").write_bytes(canonical_json(values))
        with pytest.raises(CacheCorrupt, match=r"manifest\.json is damaged"):
            CacheReader.open(folder)


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


def test_hostile_json_is_a_named_error(tmp_path: Path):
    """Values that break what would be done with them: infinities, depth, sizes, digests that are none."""
    plan = make_plan()
    folder = write_cache(tmp_path / "c", plan)
    for name in ("plan.json", "manifest.json"):
        whole = (folder / name).read_bytes()
        deep = b"[" * 800 + b"]" * 800
        key = b'"kind":"test"' if name == "plan.json" else b'"size":'
        for changed in (
            whole.replace(key, b'"kind":1e400' if name == "plan.json" else b'"size":1e400'),
            whole.replace(key, key.split(b":")[0] + b":" + deep + b',"x":', 1),
            whole.replace(b'"first_sequence":0', b'"first_sequence":' + b"9" * 400),
            whole.replace(b'"sha256":"', b'"sha256":"\\ud800', 1),
            deep * 100,
        ):
            if changed == whole:
                continue
            (folder / name).write_bytes(changed)
            with pytest.raises(CacheError):
                CacheReader.open(folder)
        (folder / name).write_bytes(whole)
    for extent in (-5, 0, 1 << 41, True, "4"):
        (folder / "extent.json").write_bytes(canonical_json({"num_sequences": extent}))
        with CacheReader.open(folder) as reader:
            assert reader.plan.num_sequences == 5


def test_equal_plans_have_equal_ids_and_any_change_another():
    plan = make_plan()
    assert CachePlan.from_json_bytes(plan.to_json_bytes(), num_sequences=5) == plan
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
