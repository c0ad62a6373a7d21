from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
from small_cache import SmallCache, published, upload

from distill_pretrain.cache import merge as cache_merge
from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.cli.main import main
from tests.support.distributed import REPOSITORY, torchrun


def recompress(*arguments: object) -> int:
    return main(["recompress", *map(str, arguments)])


def test_there_and_back_and_what_is_said(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hc, back = tmp_path / "hc", tmp_path / "back"
    assert recompress(small_cache.folder, hc) == 0
    out = capsys.readouterr().out
    with CacheReader.open(small_cache.folder) as old, CacheReader.open(hc) as new:
        before, after = (r.manifest.totals["bytes_per_token"] for r in (old, new))
    assert f"bytes per token: {before:.2f} before, {after:.2f} after" in out
    (tables,) = hc.glob("codec-*.bin")
    assert f"tables: {tables.stat().st_size:,} bytes beside that" in out
    assert "0 of 3 shards have tables of their own" in out
    assert main(["verify", str(small_cache.recipe), f"data.cache={hc}"]) == 0
    assert recompress(hc, back, "--codec", "raw") == 0
    assert published(back) == published(small_cache.folder)


def test_a_url_is_read(small_cache: SmallCache, tmp_path: Path) -> None:
    url = upload(small_cache.folder, "memory://recompress/cache")
    assert recompress(url, tmp_path / "a") == 0
    assert recompress(small_cache.folder, tmp_path / "b") == 0
    assert published(tmp_path / "a") == published(tmp_path / "b")


def test_a_job_of_two_processes_writes_the_same_bytes(
    small_cache: SmallCache, tmp_path: Path
) -> None:
    assert recompress(small_cache.folder, tmp_path / "one") == 0
    verb = ["-m", "distill_pretrain", "recompress", str(small_cache.folder), str(tmp_path / "two")]
    done = subprocess.run(
        torchrun(2, *verb), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cache complete" in done.stdout
    assert published(tmp_path / "two") == published(tmp_path / "one")


def test_mistakes_are_one_message_and_exit_status_2(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, new = small_cache.folder, tmp_path / "new"
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder, unfinished)
    (unfinished / "manifest.json").unlink()
    for arguments, message in (
        ((folder, folder), "also one to read"),
        ((unfinished, new), "the cache is not finished"),
        ((tmp_path / "nothing", new), "no cache here"),
        ((folder, unfinished), "made from something else"),
        ((folder, "s3://bucket/new"), "a cache is written to a folder"),
        ((folder, new, "--codec", "raw"), "has that codec already"),
        ((folder, new, "--codec", "raw", "--shard-tables"), "codec raw has no tables"),
        ((folder, new, "--pilot-tokens", 0), "--pilot-tokens"),
    ):
        assert recompress(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("distill-pretrain recompress: error: ")
        assert "remedy: " in error
        assert not new.exists()


def test_a_recipe_that_cannot_be_copied_is_named(
    small_cache: SmallCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(source: object, name: str, target: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(cache_merge, "copy_file", full)
    assert recompress(small_cache.folder, tmp_path / "c") == 2
    error = capsys.readouterr().err
    assert "the recipe of the cache cannot be copied" in error
    assert "No space left on device" in error
