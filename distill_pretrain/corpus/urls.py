"""Corpus files of object stores and web servers, through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from distill_pretrain.errors import CorpusError, DistillPretrainError
from distill_pretrain.files.storage import missing_package

_WEB = ("http", "https")
# What stores call a file's version. Of a file without any of these only the size is known.
_VERSIONS = (
    "ETag etag Content-MD5 content_md5 md5Hash generation LastModified Last-Modified last_modified "
    "updated mtime created"
).split()


class Store:
    """What is below a URL.

    Attributes:
        url: as the recipe gives it.
        root: the path that fsspec makes of it.
    """

    def __init__(self, url: str) -> None:
        """Connect to the store; nothing is read yet.

        Raises:
            MissingDependency: the package for this kind of URL is not installed.
            CorpusError: the URL cannot be used, or the store does not answer.
        """
        self.url = url
        with answering(url):
            try:
                from fsspec.core import url_to_fs

                self._files, root = url_to_fs(url)
            except ImportError as error:
                raise missing_package(url, error, kind=CorpusError) from None
            except ValueError as error:
                raise CorpusError(
                    "the URL cannot be used",
                    where=url,
                    found=error,
                    expected="a protocol that fsspec knows, such as s3://, gs://, az://, https://",
                    remedy="correct corpus.paths",
                ) from None
        self.root = str(root)

    def is_folder(self) -> bool:
        """Tell whether the URL names a folder; a web address does where it ends with a slash."""
        if self.url.partition("://")[0] in _WEB:
            return self.url.endswith("/")
        with answering(self.url):
            # Listings are kept by fsspec; files may have come since.
            self._files.invalidate_cache()
            return bool(self._files.isdir(self.root))

    def info(self) -> dict[str, Any]:
        """Return the record of the file that the URL names, with "size"."""
        with answering(self.url):
            found: dict[str, Any] = self._files.info(self.root)
            return found

    def find(self) -> dict[str, dict[str, Any]]:
        """Return path -> record of every file below the URL."""
        with answering(self.url):
            found: dict[str, dict[str, Any]] = self._files.find(self.root, detail=True)
            # Some servers list names only.
            return {
                path: info if info.get("size") is not None else self._files.info(path)
                for path, info in found.items()
            }

    def url_of(self, path: str) -> str:
        """Return the URL of a path that `find` gave."""
        return str(self._files.unstrip_protocol(path))

    def open(self) -> BinaryIO:
        """Open the file that the URL names, for reading."""
        with answering(self.url):
            return cast(BinaryIO, self._files.open(self.root, "rb"))

    def read(self, path: str) -> bytes:
        """Read the contents of a small file that `find` gave."""
        with answering(self.url_of(path)):
            data: bytes = self._files.cat_file(path)
            return data


def version_of(info: dict[str, Any]) -> str:
    """Return what a store says of a file's version; empty where it says nothing."""
    return " ".join(f"{name}={info[name]}" for name in _VERSIONS if info.get(name))


@contextmanager
def answering(url: str) -> Iterator[None]:
    """Turn the many failures of stores and networks inside the block into one error."""
    try:
        yield
    except DistillPretrainError:
        raise
    except FileNotFoundError:
        raise CorpusError(
            "corpus file not found", where=url, remedy="correct corpus.paths"
        ) from None
    except Exception as error:
        raise CorpusError(
            "corpus file cannot be read",
            where=url,
            found=f"{type(error).__name__}: {error}",
            remedy="check the address, permissions and the network, and run again",
        ) from error
