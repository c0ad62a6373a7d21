"""One file of a corpus: where it is, what its name says, and its bytes as they are stored."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from distill_pretrain.corpus.urls import Store, answering, version_of
from distill_pretrain.errors import CorpusError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus.

    Attributes:
        path: where it is; of a URL the part behind the protocol.
        size: bytes as stored.
        modified_ns: time of its last change, ns since 1970; 0 of a URL.
        from_directory: found in a directory, so that `corpus.exclude` can leave it out.
        holds_json_lines: its first line is an object with the text, whatever it is called.
        url: of a file in a store.
        version: what the store says of that file's version.
    """

    path: PurePath
    size: int
    modified_ns: int
    from_directory: bool
    holds_json_lines: bool = False
    url: str | None = None
    version: str = ""

    @classmethod
    def local(cls, path: Path, *, from_directory: bool) -> SourceFile:
        """Describe a file of this machine, which is there."""
        status = path.stat()
        return cls(
            path=path,
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            from_directory=from_directory,
        )

    @classmethod
    def remote(cls, url: str, info: dict[str, Any], *, from_directory: bool) -> SourceFile:
        """Describe a file of a store, by the store's own record of it."""
        if info.get("size") is None:
            raise CorpusError(
                "the store does not tell the size of the file",
                where=url,
                remedy="copy it to a disk, and name that copy in corpus.paths",
            )
        return cls(
            path=PurePath(url.partition("://")[2].partition("?")[0]),
            size=int(info["size"]),
            modified_ns=0,
            from_directory=from_directory,
            url=url,
            version=version_of(info),
        )

    @property
    def where(self) -> str:
        """The name of the file in messages."""
        return self.url or str(self.path)

    @property
    def suffix(self) -> str:
        """The suffix of the name without what says that the file is packed: ".jsonl" of a.jsonl.gz."""
        path = self.path
        return path.with_suffix("").suffix.lower() if self._is_named_packed else path.suffix.lower()

    @property
    def _is_named_packed(self) -> bool:
        return self.path.suffix.lower() in PACKED_SUFFIXES

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document of its own."""
        return self.holds_json_lines or self.suffix in JSONL_SUFFIXES

    @property
    def remedy(self) -> str:
        """What to do about a file that is not text."""
        if self.from_directory:
            return f"leave it out, for example corpus.exclude=['{self.path.name}']"
        return "remove it from corpus.paths, or convert it to UTF-8 text"

    def is_unchanged(self) -> bool:
        """Tell whether the file still has the size and version that it was found with."""
        if self.url is not None:
            info = Store(self.url).info()
            return (info.get("size"), version_of(info)) == (self.size, self.version)
        status = Path(self.path).stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.modified_ns)


class StoredFile(io.RawIOBase):
    """The bytes of a corpus file; what a disk or a store fails is an error that names the file.

    Attributes:
        position: of the byte that is read next.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        with self._reading():
            self._handle: BinaryIO = (
                Store(file.url).open() if file.url else open(file.path, "rb", buffering=0)  # noqa: SIM115
            )
        self.position = 0

    def readable(self) -> bool:
        """Say that the file can be read (see `io.RawIOBase`)."""
        return True

    def seekable(self) -> bool:
        """Tell whether the store lets one begin anywhere."""
        return self._handle.seekable()

    def tell(self) -> int:
        """Return the position of the byte that is read next."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another position, and return it (see `io.RawIOBase`)."""
        with self._reading():
            self.position = self._handle.seek(offset, whence)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as fit into the buffer, and return their number; 0 at the end."""
        view = memoryview(buffer)
        with self._reading():
            data = self._handle.read(len(view))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        """Give the file up."""
        if not self.closed:
            self._handle.close()
        super().close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        if self._file.url is not None:
            with answering(self._file.url):
                yield
            return
        try:
            yield
        except OSError as error:
            raise unreadable(self._file, error) from None


def unreadable(file: SourceFile, error: OSError) -> CorpusError:
    """Make the error for a file that the disk refuses to read."""
    return CorpusError(
        "corpus file cannot be read", where=file.where, found=error.strerror, remedy=file.remedy
    )
