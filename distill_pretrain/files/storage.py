"""Where a finished cache lies: a local or mounted folder, or an object store that fsspec reaches.

Only reading: caches are written to a folder (appending, locks and renames are a file system's).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from distill_pretrain.errors import (
    CacheError,
    CacheIncomplete,
    CacheUnreadable,
    DistillPretrainError,
    MissingDependency,
)
from distill_pretrain.files.closing import Closing

# Protocol -> (package, extra of distill-pretrain that brings it), or the extra of fsspec.
_EXTRAS = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
}
_FSSPEC_EXTRAS = {
    "http": "http",
    "https": "http",
    "sftp": "sftp",
    "ssh": "ssh",
    "smb": "smb",
    "hdfs": "hdfs",
    "git": "git",
    "github": "github",
    "libarchive": "libarchive",
    "oci": "oci",
    "dropbox": "dropbox",
}


class RangeFile(Protocol):
    """A file open for positioned reads."""

    size: int
    """Bytes when it was opened."""

    def read(self, length: int, offset: int) -> bytes:
        """Read the bytes of a range; fewer only at the end of the file."""

    def close(self) -> None:
        """Give the file up."""


class Storage(Protocol):
    """The files of one cache."""

    location: str
    """Folder or URL, as messages name it."""

    def read(self, name: str) -> bytes:
        """Read a whole file; FileNotFoundError if there is none."""

    def names(self) -> set[str]:
        """Names of what is there, from one listing; empty if there is no such folder."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes by name of every file, each of which may be asked for; empty if there is no such folder."""

    def open(self, name: str) -> RangeFile:
        """Open a file for positioned reads; FileNotFoundError if there is none."""


def is_remote(location: str | Path) -> bool:
    """Tell whether a location is a URL and not a path."""
    return "://" in str(location)


def open_storage(location: str | Path) -> Storage:
    """Open the storage of a folder, or of a URL such as s3://bucket/cache.

    Raises:
        MissingDependency: the package for this kind of URL is not installed.
        CacheIncomplete: the URL names a file that is not there, such as an archive.
        CacheError: the URL cannot be used, or the store does not answer.
    """
    return _RemoteStorage(str(location)) if is_remote(location) else _Folder(Path(location))


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """Read bytes at a position; fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class LocalFile(Closing):
    """An open file descriptor with positioned reads.

    Attributes:
        fd: closed with this object.
        size: bytes when it was opened.
    """

    def __init__(self, fd: int, name: str, *, owned: bool = True) -> None:
        """Use `fd`, and close it in the end if it is `owned`; `name` is for messages."""
        self.fd = fd
        self._owned = owned
        self.name = name
        self.size = os.fstat(fd).st_size

    @classmethod
    def open(cls, path: Path) -> LocalFile:
        """Open a file; FileNotFoundError if there is none."""
        with _reading_errors(str(path)):
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))

    def read(self, length: int, offset: int) -> bytes:
        """Read the bytes of a range; fewer only at the end of the file."""
        with _reading_errors(self.name):
            return read_exactly(self.fd, length, offset)

    def close(self) -> None:
        """Close the file; further reads fail."""
        if self.fd >= 0 and self._owned:
            os.close(self.fd)
        self.fd = -1


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def read(self, name: str) -> bytes:
        with _reading_errors(str(self.folder / name)):
            return (self.folder / name).read_bytes()

    def names(self) -> set[str]:
        try:
            with _reading_errors(self.location):
                return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()

    def sizes(self) -> dict[str, int]:
        if not self.folder.is_dir():
            return {}
        sizes = {}
        with _reading_errors(self.location), os.scandir(self.folder) as entries:
            for entry in entries:
                # Temporary files of a running capture vanish at any time.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        sizes[entry.name] = entry.stat().st_size
        return sizes

    def open(self, name: str) -> RangeFile:
        return LocalFile.open(self.folder / name)


class _RemoteStorage:
    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.location)
        except ImportError as error:
            raise missing_package(url, error) from None
        except ValueError as error:
            raise CacheError(
                "the cache's URL cannot be used",
                where=url,
                found=error,
                expected="a protocol that fsspec knows, such as s3://, gs://, az://, hdfs://",
                remedy="correct data.cache",
            ) from None
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheIncomplete(
                "no cache here", where=url, found=error, remedy="correct data.cache"
            ) from None
        except Exception as error:
            raise _unreadable(url, error) from error

    def read(self, name: str) -> bytes:
        with _reading_errors(f"{self.location}/{name}"):
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
            return data

    def names(self) -> set[str]:
        with _reading_errors(self.location):
            return {str(path).rpartition("/")[2] for path in self._list(detail=False)}

    def sizes(self) -> dict[str, int]:
        sizes = {}
        with _reading_errors(self.location):
            for entry in self._list(detail=True):
                with suppress(FileNotFoundError):
                    if entry["type"] == "file":
                        sizes[entry["name"].rpartition("/")[2]] = self._size(entry)
        return sizes

    def _list(self, *, detail: bool) -> list[Any]:
        """Paths, or with detail records, of what is there; some stores ask for every file's size in turn for those."""
        # Listings are cached by fsspec; a cache may have grown since.
        self._files.invalidate_cache()
        try:
            listed: list[Any] = self._files.ls(self._root, detail=detail)
        except FileNotFoundError:
            return []
        return listed

    def open(self, name: str) -> RangeFile:
        with _reading_errors(f"{self.location}/{name}"):
            size = self._size({"name": f"{self._root}/{name}"})
        return _RemoteFile(self._files, f"{self._root}/{name}", size, f"{self.location}/{name}")

    def _size(self, entry: dict[str, Any]) -> int:
        """Bytes of a listed file; some stores list names only."""
        size = entry.get("size")
        if size is None:
            size = self._files.info(entry["name"])["size"]
        if size is None:
            raise OSError(f"the store does not tell the size of {entry['name']}")
        return int(size)


class _RemoteFile:
    def __init__(self, files: Any, path: str, size: int, where: str) -> None:
        self.size = size
        self._files, self._path, self._where = files, path, where

    def read(self, length: int, offset: int) -> bytes:
        # A store may refuse a range that begins at the end of the file or beyond.
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            with _reading_errors(self._where):
                data: bytes = self._files.cat_file(self._path, start=offset, end=offset + length)
                return data
        except FileNotFoundError:
            raise CacheIncomplete(
                "a file of the cache vanished while it was read",
                where=self._where,
                remedy="copy the file again, or run `distill-pretrain capture` again",
            ) from None

    def close(self) -> None:
        """Nothing is held open between two reads."""


@contextmanager
def _reading_errors(where: str) -> Iterator[None]:
    """The many kinds of failure of disks and stores as one; FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except NotADirectoryError:
        raise FileNotFoundError(where) from None
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> CacheError:
    """CacheUnreadable, unless the same would be found again."""
    lasting = isinstance(error, PermissionError | IsADirectoryError)
    kind = CacheError if lasting else CacheUnreadable
    return kind(
        "the cache cannot be read",
        where=where,
        found=f"{type(error).__name__}: {error}",
        remedy="check permissions, disk or network, and run again",
    )


def missing_package(
    url: str, error: ImportError, kind: type[DistillPretrainError] = CacheError
) -> DistillPretrainError:
    """Make the error for a URL whose package is missing.

    It is MissingDependency, or `kind` where nobody knows what brings the package.
    """
    protocol = url.rpartition("://")[0].rpartition("::")[2]
    purpose = f"reading {url}"
    if (error.name or "").partition(".")[0] == "fsspec":
        return MissingDependency("fsspec", needed_for=purpose)
    if protocol in _EXTRAS:
        package, extra = _EXTRAS[protocol]
        return MissingDependency(package, extra=extra, needed_for=purpose)
    if protocol in _FSSPEC_EXTRAS:
        return MissingDependency(f"fsspec[{_FSSPEC_EXTRAS[protocol]}]", needed_for=purpose)
    return kind(
        "a package for this kind of URL is not installed",
        where=url,
        found=error,
        remedy="install the package that fsspec asks for",
    )
