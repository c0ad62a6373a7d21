from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache import CacheReader, verify_cache
from distill_pretrain.cache.recompress import recompress_cache
from distill_pretrain.errors import CacheCorrupt, CacheError, CacheIncomplete, MissingDependency
from distill_pretrain.files.storage import open_storage
from tests.support.cache_samples import Cache, make_labels, make_targets, make_tokens

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def url() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.mkdirs("/bucket")
    yield "memory://bucket/cache"
    files.rm("/bucket", recursive=True)


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("codec", ["raw", "hc"])
def test_a_url_gives_the_same_targets_as_the_folder(
    cache: Cache, tmp_path: Path, url: str, codec: str, end: str
):
    folder, plan = cache.folder, cache.plan
    if codec == "hc":
        folder = tmp_path / "hc"
        recompress_cache(cache.folder, folder, pilot_tokens=100)
    upload(folder, url)
    with CacheReader.open(url + end, max_open=1) as remote, CacheReader.open(folder) as local:
        assert remote.manifest_sha256 == local.manifest_sha256
        for sequence in (4, 0, 3, 1, 2):
            tokens = make_tokens(plan, sequence)
            found, expected = remote.read(sequence, tokens), local.read(sequence, tokens)
            for name in ("entries_per_token", "ids", "values"):
                assert np.array_equal(getattr(found, name), getattr(expected, name))
        part = remote.read(3, make_tokens(plan, 3), 4, 9)
        entries = make_targets(plan, 3, 4, 5).entries_per_token
        assert np.array_equal(part.entries_per_token, entries)
    assert verify_cache(url, lambda s: make_tokens(plan, s)).problems == ()


def test_no_cache_behind_a_url(url: str):
    fsspec.filesystem("memory").mkdirs("/bucket/other")
    for place in (url, "memory://bucket/other", "memory://nowhere/at/all"):
        with pytest.raises(CacheIncomplete, match=f"no cache here; where: {place}"):
            CacheReader.open(place)


def test_no_folder_has_no_files(tmp_path: Path, url: str):
    for place in (url, tmp_path / "nothing"):
        storage = open_storage(place)
        assert storage.sizes() == {} and storage.names() == set()
        with pytest.raises(FileNotFoundError):
            storage.read("plan.json")
        with pytest.raises(FileNotFoundError):
            storage.open("plan.json")


def test_missing_and_cut_off_files_behind_a_url_are_named(cache: Cache, url: str):
    upload(cache.folder, url)
    files = fsspec.filesystem("memory")
    shard = files.cat_file("/bucket/cache/s-000001.dpt")
    files.pipe_file("/bucket/cache/s-000001.dpt", shard[:-1])
    with (
        CacheReader.open(url) as reader,
        pytest.raises(CacheCorrupt, match=f"{url}/s-000001.dpt, sequences 2 to 3"),
    ):
        reader.read(2, make_labels(cache.plan, 2))
    files.rm("/bucket/cache/s-000001.dpt")
    with pytest.raises(CacheIncomplete, match=r"no s-000001.dpt: sequences 2 to 3"):
        CacheReader.open(url)
    files.pipe_file("/bucket/cache/s-000001.dpt", shard)
    with CacheReader.open(url) as reader:
        files.rm("/bucket/cache/s-000001.dpt")
        with pytest.raises(CacheIncomplete, match=r"vanished .*s-000001.dpt, sequences 2"):
            reader.read(2, make_labels(cache.plan, 2))


def test_a_flipped_byte_behind_a_url_is_found(cache: Cache, url: str):
    upload(cache.folder, url)
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat_file("/bucket/cache/s-000000.dpt"))
    data[310] ^= 1
    files.pipe_file("/bucket/cache/s-000000.dpt", bytes(data))
    with CacheReader.open(url) as reader, pytest.raises(CacheCorrupt, match="shard 0, block 0"):
        reader.read(0, make_tokens(cache.plan, 0))


def test_a_failing_store_is_one_named_error(url: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise TimeoutError("no answer")

    storage = open_storage(url)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", broken)
    with pytest.raises(CacheError, match=f"{url}/plan.json; found: TimeoutError: no answer"):
        storage.read("plan.json")


def test_unusable_urls_say_what_to_do():
    with pytest.raises(CacheError, match="protocol that fsspec knows"):
        open_storage("nonsense://bucket/cache")


@pytest.mark.parametrize(
    ("url", "package", "line"),
    [
        ("s3://bucket/cache", "s3fs", "distill-pretrain[s3]"),
        ("filecache::gs://bucket/cache", "gcsfs", "distill-pretrain[gcs]"),
        ("zip://a::https://host/cache.zip", "fsspec[http]", "fsspec[http]"),
        ("sftp://host/cache", "fsspec[sftp]", "fsspec[sftp]"),
    ],
)
def test_a_missing_package_is_named(
    url: str, package: str, line: str, monkeypatch: pytest.MonkeyPatch
):
    def missing(url: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(MissingDependency) as caught:
        open_storage(url)
    assert f"{package} is not installed" in str(caught.value)
    assert f"remedy: pip install '{line}'" in str(caught.value)


def test_other_packages_are_named_by_fsspec(monkeypatch: pytest.MonkeyPatch):
    def missing(url: str) -> None:
        raise ImportError("Install webdav4 to access WebDAV")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(CacheError, match="Install webdav4"):
        open_storage("webdav://host/cache")


def test_without_fsspec_its_name_is_in_the_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependency, match="pip install 'fsspec'"):
        open_storage("memory://cache")


def test_a_store_that_cannot_be_opened_is_one_named_error():
    with pytest.raises(CacheError, match=r"ftp://127\.0\.0\.1:1/x; found: ConnectionRefusedError"):
        open_storage("ftp://127.0.0.1:1/x")
    with pytest.raises(CacheIncomplete, match=r"no cache here; .*nonexist\.zip"):
        open_storage("zip://a::/nonexist.zip")


def test_a_listing_without_sizes_is_completed(cache: Cache, url: str, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    real = MemoryFileSystem.ls

    def names_only(self, path, detail=True, **options):
        return [{**entry, "size": None} for entry in real(self, path, detail=True, **options)]

    upload(cache.folder, url)
    expected = open_storage(url).sizes()
    monkeypatch.setattr(MemoryFileSystem, "ls", names_only)
    assert open_storage(url).sizes() == expected
    assert len(expected) > 5
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *args: {"size": None})
    for ask in (open_storage(url).sizes, lambda: open_storage(url).open("plan.json")):
        with pytest.raises(CacheError, match="does not tell the size"):
            ask()


def test_a_failing_listing_is_one_named_error(url: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise TimeoutError("no answer")

    storage = open_storage(url)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "invalidate_cache", broken)
    with pytest.raises(CacheError, match="TimeoutError: no answer"):
        storage.sizes()


def test_a_file_that_vanishes_between_two_reads_is_named(cache: Cache, url: str):
    upload(cache.folder, url)
    file = open_storage(url).open("s-000000.dpt")
    assert file.read(8, 0)
    fsspec.filesystem("memory").rm("/bucket/cache/s-000000.dpt")
    with pytest.raises(CacheIncomplete, match=r"vanished .*s-000000\.dpt"):
        file.read(8, 8)


def test_a_temporary_file_that_vanishes_while_listed_is_left_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
):
    real = os.scandir
    expected = open_storage(cache.folder).sizes()

    class Vanishing:
        name = ".x.tmp"

        def is_file(self) -> bool:
            return True

        def stat(self) -> os.stat_result:
            raise FileNotFoundError(self.name)

    @contextmanager
    def scan(folder: Path) -> Iterator[Iterator[object]]:
        with real(folder) as entries:
            yield itertools.chain([Vanishing()], entries)

    monkeypatch.setattr(os, "scandir", scan)
    assert open_storage(cache.folder).sizes() == expected


def test_a_file_in_place_of_the_folder_is_no_cache(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheIncomplete, match="no cache here"):
        CacheReader.open(tmp_path / "file")


def test_nothing_is_asked_for_beyond_the_end(cache: Cache, url: str, monkeypatch):
    """S3 answers such a request with an error, unlike the file system in memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    real = MemoryFileSystem.cat_file

    def strict(self, path, start=None, end=None, **options):
        if start is not None and start >= self.info(path)["size"]:
            raise OSError(22, "The requested range is not satisfiable")
        return real(self, path, start=start, end=end, **options)

    upload(cache.folder, url)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", strict)
    assert verify_cache(url).problems == ()


def test_a_file_that_may_not_be_read_is_named(cache: Cache, monkeypatch):
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CacheError, match=r"cannot be read; where: .*plan\.json.*permissions"):
        CacheReader.open(cache.folder)
