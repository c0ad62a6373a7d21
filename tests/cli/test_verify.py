from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from small_cache import SEQ_LEN, SmallCache, make_small_cache, published, upload

from distill_pretrain.cache.reader import CacheReader, load_plan
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.cli.main import main
from distill_pretrain.errors import CacheCorrupt
from distill_pretrain.files.atomic import canonical_json
from distill_pretrain.files.storage import open_storage


def verify(cache: SmallCache, *overrides: str) -> int:
    return main(["verify", str(cache.recipe), *overrides])


def test_a_sound_cache_passes(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(small_cache) == 0
    out = capsys.readouterr().out
    assert "3 shards, 10 blocks checked" in out
    assert "sound" in out


def test_a_flipped_byte_is_found_and_its_sequences_named(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_cache.folder / "s-000001.dpt"
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 9).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert verify(small_cache) == 2
        error = capsys.readouterr().err
        assert "shards 1 (sequences 2 to 3)" in error
        assert "Traceback" not in error
    path.write_bytes(whole)
    assert verify(small_cache) == 0


def test_repair_sets_only_the_damaged_shard_aside(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_cache.folder / "s-000001.dpt"
    path.write_bytes(path.read_bytes()[:-3])
    assert verify(small_cache, "--repair") == 2
    assert "it makes shards 1 (sequences 2 to 3) anew" in capsys.readouterr().err
    names = {p.name for p in small_cache.folder.iterdir()}
    assert {"s-000000.dpt", "s-000000.json", "s-000002-n1.dpt", "plan.json"} <= names
    assert not {"s-000001.dpt", "s-000001.json", "manifest.json"} & names


def test_repair_leaves_a_sound_cache_alone(small_cache: SmallCache) -> None:
    before = {p.name: p.read_bytes() for p in small_cache.folder.iterdir()}
    assert verify(small_cache, "--repair") == 0
    assert {p.name: p.read_bytes() for p in small_cache.folder.iterdir()} == before


def test_a_store_cannot_be_repaired_in_place(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    url = upload(small_cache.folder, "memory://verify/cache")
    assert verify(small_cache, f"data.cache={url}") == 0
    assert verify(small_cache, "--repair", f"data.cache={url}") == 2
    assert "cannot be repaired in place" in capsys.readouterr().err


def test_a_missing_shard_is_listed(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_cache.folder / "s-000002-n1.dpt").unlink()
    for option in ((), ("--quick",)):
        assert verify(small_cache, *option) == 2
        assert "sequences 4 to 4" in capsys.readouterr().err


def damage_middle(cache: SmallCache) -> None:
    """A byte of the third of four blocks of shard 1."""
    path = cache.folder / "s-000001.dpt"
    data = bytearray(path.read_bytes())
    place = [n for n in range(len(data)) if data[n : n + 4] == b"BLK1"][2]
    data[place + 40] ^= 4
    path.write_bytes(data)


def test_quick_says_that_it_did_not_read_everything(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_middle(small_cache)
    assert verify(small_cache, "--quick") == 0
    out = capsys.readouterr().out
    assert "3 shards, 6 blocks checked" in out
    assert "sound" not in out
    assert "only a check without --quick reads every byte" in out
    assert verify(small_cache) == 2
    assert "shard 1, block 2" in capsys.readouterr().err


def test_quick_finds_shards_that_are_cut_off_swapped_or_of_other_tokens(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (small_cache.folder / f"s-00000{n}.dpt" for n in (0, 1))
    whole = first.read_bytes()
    for wrong in (whole[:-3], second.read_bytes()):
        first.write_bytes(wrong)
        assert verify(small_cache, "--quick") == 2
        assert "shards 0 (sequences 0 to 1)" in capsys.readouterr().err
    first.write_bytes(whole)
    assert verify(small_cache, "--quick") == 0
    capsys.readouterr()
    assert verify(make_small_cache(tmp_path / "shifted", shift=1), "--quick") == 2
    assert "the cache has 6 problems" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [False, True])
def test_another_seed_or_length_is_a_mismatch(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    if damaged:
        (small_cache.folder / "manifest.json").unlink()
    for override in ("data.seed=8", f"data.seq_len={SEQ_LEN + 1}"):
        assert verify(small_cache, override) == 2
        assert "the cache was made from" in capsys.readouterr().err


def test_no_cache_named(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(small_cache, "data.cache=null") == 2
    assert "data.cache" in capsys.readouterr().err
    assert verify(small_cache, f"data.cache={small_cache.folder.parent}") == 2
    assert "no plan.json" in capsys.readouterr().err


def test_tokens_changed_behind_an_unchanged_index(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Path = small_cache.tokens.with_name("train.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert verify(small_cache) == 2
    assert "another corpus" in capsys.readouterr().err


def test_blocks_made_from_shifted_tokens_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(make_small_cache(tmp_path, shift=1)) == 2
    error = capsys.readouterr().err
    assert "the cache has 10 problems" in error
    assert "shards 0, 1, 2 (sequences 0 to 4)" in error


def test_an_unfinished_extension_is_said_and_its_damage_is_repaired(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(open_storage(small_cache.folder))
    CacheWriter.create_or_resume(small_cache.folder, plan.with_extent(50))
    assert verify(small_cache) == 0
    assert "note: manifest.json covers 5 of 50 sequences" in capsys.readouterr().out
    path = small_cache.folder / "s-000002-n1.dpt"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert verify(small_cache, "--repair") == 2
    assert "it makes shards 2 (sequences 4 to 4) anew" in capsys.readouterr().err
    assert not path.exists()
    assert path.with_suffix(".bad").exists()


def edit_plan(cache: SmallCache, key: str, value: object) -> str:
    """Change one field of plan.json, canonically; returns the sha256 that the file had."""
    path = cache.folder / "plan.json"
    whole = path.read_bytes()
    path.write_bytes(canonical_json({**json.loads(whole), key: value}))
    return hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("micro_batch_size", 2),
        ("seq_len", SEQ_LEN - 1),
        ("sequence_plan_id", "a" * 64),
        ("teacher", {"kind": "another"}),
    ],
)
@pytest.mark.parametrize("lost", [(), ("manifest.json",), ("manifest.json", "s-*.json")])
def test_an_edited_plan_is_what_is_wrong_and_repair_touches_no_shard(
    small_cache: SmallCache,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: object,
    lost: tuple[str, ...],
) -> None:
    for pattern in lost:
        for path in small_cache.folder.glob(pattern):
            path.unlink()
    digest = edit_plan(small_cache, key, value)
    before = published(small_cache.folder)
    for options in ([], ["--quick"], ["--repair"]):
        assert verify(small_cache, *options) == 2
        error = capsys.readouterr().err
        assert "plan.json is not the plan of this cache" in error and digest in error
        assert "shard 0" not in error and "Traceback" not in error
    assert published(small_cache.folder) == before


def test_a_plan_that_is_edited_is_named_where_training_opens_the_cache(
    small_cache: SmallCache,
) -> None:
    digest = edit_plan(small_cache, "micro_batch_size", 2)
    with pytest.raises(CacheCorrupt, match=f"plan.json is not the plan.*sha256 {digest}"):
        CacheReader.open(small_cache.folder)


def test_shards_of_another_cache_are_still_what_is_wrong(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sound record is enough to say that plan.json is right."""
    (small_cache.folder / "manifest.json").unlink()
    for shard in (0, 1):
        path = small_cache.folder / f"s-00000{shard}.dpt"
        data = bytearray(path.read_bytes())
        data[56:88] = bytes(32)
        data[252:256] = zlib.crc32(data[:252]).to_bytes(4, "little")
        path.write_bytes(data)
    assert verify(small_cache, "--repair") == 2
    assert "shards 0, 1 (sequences 0 to 3)" in capsys.readouterr().err
    assert len(list(small_cache.folder.glob("*.bad"))) == 2
