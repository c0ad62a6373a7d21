from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from small_cache import SmallCache, make_small_cache, published, upload

from distill_pretrain.cache import merge as cache_merge
from distill_pretrain.cli.main import main


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


@pytest.fixture
def halves(small_cache: SmallCache, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the cache with the shards 0 and 2, and with shard 1."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, left_out in zip(folders, (("s-000001*",), ("s-000000*", "s-000002*")), strict=True):
        shutil.copytree(small_cache.folder, folder)
        (folder / "manifest.json").unlink()
        for pattern in left_out:
            for path in folder.glob(pattern):
                path.unlink()
    return folders


def test_halves_become_the_whole(
    small_cache: SmallCache, halves: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    dest = tmp_path / "c"
    assert merge(dest, *halves) == 0
    out = capsys.readouterr().out
    assert "3 shards linked, 0 copied" in out
    assert f"cache complete: {dest}, 5 sequences" in out
    assert published(dest) == published(small_cache.folder)
    assert main(["verify", str(small_cache.recipe), f"data.cache={dest}"]) == 0


def test_a_url_is_copied(
    small_cache: SmallCache, halves: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    url = upload(halves[1], "memory://merge-verb/cache")
    assert merge(tmp_path / "c", url, halves[0]) == 0
    assert "2 shards linked, 1 copied" in capsys.readouterr().out
    assert published(tmp_path / "c") == published(small_cache.folder)


def test_what_is_missing_is_named_and_can_be_added(
    small_cache: SmallCache, halves: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    dest = tmp_path / "c"
    assert merge(dest, halves[0]) == 2
    error = capsys.readouterr().err
    assert "1 of 3 shards missing: sequences 2 to 3" in error
    assert "remedy: capture them" in error
    assert {path.name for path in dest.glob("*.dpt")} == {"s-000000.dpt", "s-000002-n1.dpt"}
    assert merge(dest, halves[0], "--num-sequences", 2) == 0
    assert merge(dest, halves[1]) == 0
    assert published(dest) == published(small_cache.folder)


def test_mistakes_are_one_message_and_exit_status_2(
    small_cache: SmallCache, halves: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    new = tmp_path / "new"
    hc, other = tmp_path / "hc", make_small_cache(tmp_path / "other", shift=1).folder
    assert main(["recompress", str(small_cache.folder), str(hc)]) == 0
    capsys.readouterr()
    for arguments, message in (
        ((halves[0], halves[0]), "also one to read"),
        ((new, halves[0], tmp_path / "nothing"), "no cache here"),
        ((new, halves[0], hc), "codec: found 3, expected 1"),
        ((new, small_cache.folder, other), "shard 0 (sequences 0 to 1)"),
        (("s3://bucket/new", halves[0]), "a cache is written to a folder"),
        ((new, halves[0], "--num-sequences", 0), "num_sequences is 0"),
    ):
        assert merge(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("distill-pretrain merge: error: ")
        assert "remedy: " in error
        assert not new.exists()


def test_one_process_of_a_job_does_it(
    halves: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill_pretrain.cli import merge as verb
    from distill_pretrain.cli.main import verb_parser

    monkeypatch.setenv("RANK", "1")
    args = verb_parser("merge", verb).parse_args([str(tmp_path / "c"), str(halves[0])])
    verb.run(None, args)
    assert not (tmp_path / "c").exists()


def test_a_recipe_that_cannot_be_copied_is_named(
    small_cache: SmallCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(source: object, name: str, target: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(cache_merge, "copy_file", full)
    assert merge(tmp_path / "c", small_cache.folder) == 2
    error = capsys.readouterr().err
    assert "the recipe of the cache cannot be copied" in error
    assert "No space left on device" in error
