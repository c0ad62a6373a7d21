from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache import CachePlan, CacheReader, CacheWriter, ShardWriter, verify_cache
from distill_pretrain.cache import recompress as cache_recompress
from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.recompress import ascending, recompress_cache
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch
from tests.support.cache_samples import (
    Cache,
    make_plan,
    make_tokens,
    open_writer,
    tree,
    write_cache,
    write_shard,
)

TOPK = {"sampler": {**make_plan().sampler, "name": "topk"}, "codec": 2}
VOCAB, DRAWS, DRIFTS_FROM = 2000, 8, 3


def recompress(source: Path, dest: Path, **options: object) -> Path:
    recompress_cache(source, dest, **{"pilot_tokens": 100, **options})  # type: ignore[arg-type]
    return dest


def all_targets(folder: Path, plan: CachePlan) -> list[RaggedTargets]:
    with CacheReader.open(folder) as reader:
        count = range(plan.num_sequences)
        return [ascending(reader.read(n, make_tokens(plan, n))) for n in count]


def assert_same_targets(left: Path, right: Path, plan: CachePlan) -> None:
    pairs = zip(all_targets(left, plan), all_targets(right, plan), strict=True)
    for one, other in pairs:
        for name in ("entries_per_token", "ids", "values"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_ascending_moves_values_with_their_ids():
    targets = RaggedTargets(
        kind="counts",
        num_draws=6,
        entries_per_token=np.array([0, 2, 3, 0, 1], np.int32),
        ids=np.array([9, 4, 7, 1, 8, 0], np.int32),
        values=np.array([1, 5, 3, 2, 1, 6], np.int32),
    )
    found = ascending(targets)
    assert found.ids.tolist() == [4, 9, 1, 7, 8, 0]
    assert found.values.tolist() == [5, 1, 2, 3, 1, 6]
    assert found.entries_per_token is targets.entries_per_token
    assert ascending(found) is found


@pytest.mark.parametrize("changes", [{}, TOPK, {"block_tokens": 12}, {"shard_sequences": 100}])
def test_there_and_back_gives_the_same_bytes(tmp_path: Path, changes: dict):
    plan = make_plan(num_sequences=7, **changes)
    raw = write_cache(tmp_path / "raw", plan)
    hc = recompress(raw, tmp_path / "hc")
    assert_same_targets(raw, hc, plan)
    assert verify_cache(hc, lambda s: make_tokens(plan, s)).problems == ()
    back = recompress(hc, tmp_path / "back", codec="raw")
    assert tree(back) == tree(raw)


def test_only_the_codec_of_the_plan_and_the_coding_of_the_records_change(
    tmp_path: Path, cache: Cache
):
    hc = recompress(cache.folder, tmp_path / "hc")
    with CacheReader.open(hc) as new, CacheReader.open(cache.folder) as old:
        assert {line.partition(":")[0] for line in new.plan.differences(old.plan)} == {
            "codec",
            "codec_sha256",
        }
        for found, kept in zip(new.manifest.shards, old.manifest.shards, strict=True):
            assert kept.labelled
            assert (found.labelled, found.label_hits) == (kept.labelled, kept.label_hits)
            assert (found.entries, found.tokens) == (kept.entries, kept.tokens)
            assert found.codec_sha256 == new.plan.codec_sha256


def test_unmeasured_canaries_stay_unmeasured(tmp_path: Path):
    plan = make_plan()
    writer = CacheWriter.create_or_resume(tmp_path / "raw", plan)
    for shard in range(plan.num_shards):
        write_shard(writer, shard)
    writer.publish_manifest()
    with CacheReader.open(recompress(tmp_path / "raw", tmp_path / "hc")) as reader:
        assert {record.labelled for record in reader.manifest.shards} == {None}


def drifting_targets(
    plan: CachePlan, sequence: int, size: int, rng: np.random.Generator
) -> RaggedTargets:
    """Few frequent ids; from shard DRIFTS_FROM on, others, which the first sequences never have."""
    first = 0 if sequence < DRIFTS_FROM * plan.shard_sequences else VOCAB // 2
    steps = 1 if first == 0 else 37
    rows = [first + steps * np.sort(rng.permutation(24)[:DRAWS]) for _ in range(size)]
    return RaggedTargets(
        kind="counts",
        num_draws=DRAWS,
        entries_per_token=np.full(size, DRAWS, np.int32),
        ids=np.concatenate(rows).astype(np.int32),
        values=np.ones(size * DRAWS, np.int32),
    )


def write_drifting(folder: Path, seq_len: int) -> Cache:
    plan = make_plan(
        vocab_size=VOCAB,
        sampler={**make_plan().sampler, "num_draws": DRAWS},
        seq_len=seq_len,
        num_sequences=8,
        block_tokens=1024,
    )
    rng = np.random.default_rng(3)
    writer = open_writer(folder, plan)
    for shard in range(plan.num_shards):
        claimed = writer.claim(shard)
        assert claimed is not None
        with claimed:
            while claimed.next_block < claimed.num_blocks:
                sequence, offset, size = claimed.place(claimed.next_block)
                tokens = make_tokens(plan, sequence)[offset : offset + size]
                claimed.append(drifting_targets(plan, sequence, size, rng), tokens)
            claimed.finish()
    writer.publish_manifest()
    return Cache(folder, plan)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write_drifting(tmp_path_factory.mktemp("drifting") / "cache", seq_len=4096)


def test_a_drifted_shard_gets_tables_of_its_own_and_others_do_not(tmp_path: Path, drifting: Cache):
    shared = recompress(drifting.folder, tmp_path / "shared", pilot_tokens=4096)
    own = recompress(drifting.folder, tmp_path / "own", pilot_tokens=4096, shard_tables=True)
    assert_same_targets(own, drifting.folder, drifting.plan)
    assert len(list(shared.glob("codec-*"))) == 1
    with CacheReader.open(own) as reader:
        tables = [record.codec_sha256 for record in reader.manifest.shards]
        plans = reader.plan.codec_sha256
    assert tables[:DRIFTS_FROM] == [plans] * DRIFTS_FROM
    assert plans not in tables[DRIFTS_FROM:]
    for name in [f"s-{shard:06d}.dpt" for shard in range(DRIFTS_FROM)]:
        assert (own / name).read_bytes() == (shared / name).read_bytes()
    # Together with its tables the drifted shard is smaller.
    for shard in range(DRIFTS_FROM, drifting.plan.num_shards):
        extra = (own / f"codec-{tables[shard]}.bin").stat().st_size
        name = f"s-{shard:06d}.dpt"
        assert (own / name).stat().st_size + extra < (shared / name).stat().st_size
    assert verify_cache(own, lambda s: make_tokens(drifting.plan, s)).problems == ()
    back = recompress(own, tmp_path / "back", codec="raw")
    assert tree(back) == tree(drifting.folder)


def test_tables_that_do_not_pay_for_themselves_are_not_kept(tmp_path: Path):
    """The last shard drifts, but is so short that its own tables would save less than they take."""
    raw = write_drifting(tmp_path / "raw", seq_len=64).folder
    plain = recompress(raw, tmp_path / "plain", pilot_tokens=64)
    same = recompress(raw, tmp_path / "same", pilot_tokens=64, shard_tables=True)
    assert tree(same) == tree(plain)


def run_slowly(source: Path, dest: Path, seed: int, shard_tables: bool) -> None:
    draw = random.Random(seed)
    real = ShardWriter.append_hashed

    def slow(self: ShardWriter, *args: object) -> None:
        time.sleep(draw.random() * 0.004)
        real(self, *args)  # type: ignore[arg-type]

    ShardWriter.append_hashed = slow  # type: ignore[method-assign]
    recompress(source, dest, pilot_tokens=4096, shard_tables=shard_tables)


@pytest.mark.parametrize("shard_tables", [False, True])
def test_killed_and_racing_processes_leave_the_same_bytes(
    tmp_path: Path, drifting: Cache, shard_tables: bool
):
    whole = recompress(
        drifting.folder, tmp_path / "whole", pilot_tokens=4096, shard_tables=shard_tables
    )
    fork = multiprocessing.get_context("fork")
    draw, dest = random.Random(1), tmp_path / "killed"
    kills = attempt = 0
    while True:
        workers = [
            fork.Process(
                target=run_slowly, args=(drifting.folder, dest, draw.randrange(99), shard_tables)
            )
            for _ in range(draw.choice([1, 2]))
        ]
        for worker in workers:
            worker.start()
        time.sleep(0.03 + draw.random() * 0.02 * attempt)
        attempt += 1
        for worker in workers:
            worker.kill()
            worker.join()
            assert worker.exitcode in (0, -signal.SIGKILL)
            kills += worker.exitcode != 0
        if (dest / "manifest.json").exists():
            break
    assert kills >= 3
    assert tree(dest) == tree(whole)


def test_a_shard_whose_record_was_lost_keeps_its_canary(tmp_path: Path, cache: Cache):
    """Killed between the rename of a shard and its done record."""
    hc = recompress(cache.folder, tmp_path / "hc")
    before = tree(hc)
    for name in ("s-000001.json", "manifest.json"):
        (hc / name).unlink()
    inode = (hc / "s-000001.dpt").stat().st_ino
    assert tree(recompress(cache.folder, hc)) == before
    assert (hc / "s-000001.dpt").stat().st_ino == inode


def test_a_cache_is_joined_with_the_tables_it_has(tmp_path: Path, cache: Cache):
    hc = recompress(cache.folder, tmp_path / "hc")
    before = tree(hc)
    assert tree(recompress(cache.folder, hc, pilot_tokens=1)) == before


def test_a_codec_that_does_not_give_back_what_it_got_is_noticed(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
):
    real = HcCodec.encode

    def wrong(self: HcCodec, targets: RaggedTargets) -> bytes:
        counts = targets.values.copy()
        many = np.flatnonzero(targets.entries_per_token > 1)
        start = int(targets.entries_per_token[: many[0]].sum())
        counts[start], counts[start + 1] = counts[start + 1], counts[start]
        return real(self, cache_recompress.replace(targets, values=counts))

    monkeypatch.setattr(HcCodec, "encode", wrong)
    with pytest.raises(CacheError, match="does not give back what it was given"):
        recompress(cache.folder, tmp_path / "hc")
    assert not list((tmp_path / "hc").glob("*.dpt"))


def test_a_damaged_source_is_refused_and_its_block_named(tmp_path: Path, cache: Cache):
    path = cache.folder / "s-000001.dpt"
    data = bytearray(path.read_bytes())
    data[310] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="shard 1, block 0"):
        recompress(cache.folder, tmp_path / "hc")
    assert not (tmp_path / "hc" / "manifest.json").exists()


@pytest.mark.parametrize("late", [False, True])
def test_a_source_shard_that_vanishes_is_named(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, late: bool
):
    real = cache_recompress.FinishedShards

    def listed(*args: object) -> cache_recompress.FinishedShards:
        path = cache.folder / "s-000001.dpt"
        if not late:
            path.unlink()
        shards = real(*args)  # type: ignore[arg-type]
        path.unlink(missing_ok=True)
        return shards

    monkeypatch.setattr(cache_recompress, "FinishedShards", listed)
    with pytest.raises(CacheIncomplete, match=r"vanished.*s-000001\.dpt, sequences 2 to 3"):
        recompress(cache.folder, tmp_path / "hc", pilot_tokens=1)


def test_mistakes_are_named(tmp_path: Path, cache: Cache):
    with pytest.raises(CacheError, match="also one to read"):
        recompress(cache.folder, tmp_path / "x" / ".." / "cache")
    with pytest.raises(CacheError, match="has that codec already"):
        recompress(cache.folder, tmp_path / "raw", codec="raw")
    with pytest.raises(CacheIncomplete, match="no cache here"):
        recompress(tmp_path / "nothing", tmp_path / "hc")
    other = write_cache(tmp_path / "other", make_plan(micro_batch_size=7))
    with pytest.raises(CacheMismatch, match="codec: found 1, expected 3"):
        recompress(cache.folder, other)
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(CacheIncomplete, match="the cache is not finished"):
        recompress(cache.folder, tmp_path / "hc")
    assert not (tmp_path / "hc").exists()


def test_a_source_that_grew_extends_the_copy(tmp_path: Path, cache: Cache):
    hc = recompress(cache.folder, tmp_path / "hc")
    tables = {path.name for path in hc.glob("codec-*")}
    inode = (hc / "s-000001.dpt").stat().st_ino
    grown = make_plan(num_sequences=9)
    write_cache(cache.folder, grown)
    recompress(cache.folder, hc)
    assert_same_targets(hc, cache.folder, grown)
    assert (hc / "s-000001.dpt").stat().st_ino == inode
    assert {path.name for path in hc.glob("codec-*")} == tables
