"""Opening corpus files by what is in them: gzip and zstd are unpacked on the way, whatever the name says."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

from distill_pretrain.corpus.source_file import SourceFile, StoredFile
from distill_pretrain.errors import CorpusError, MissingDependency

UTF8_BOM = b"\xef\xbb\xbf"
PARQUET, ARROW_STREAM, ARROW_FILE = "Parquet", "Arrow stream", "Arrow file"
TABLES = (PARQUET, ARROW_STREAM, ARROW_FILE)
GZIP, ZSTD = "gzip", "zstd"
_MAGIC = {
    b"\x1f\x8b": GZIP,
    b"\x28\xb5\x2f\xfd": ZSTD,
    b"PAR1": PARQUET,
    b"ARROW1": ARROW_FILE,
    b"\xff\xff\xff\xff": ARROW_STREAM,
    # These are not read, and named where they are met.
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_BUFFER_BYTES = 1 << 20
_LONGEST_FIRST_LINE = 1 << 26


def kind_of(head: bytes) -> str | None:
    """Tell what a file is by its first bytes; None for text, or what nobody knows."""
    if len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        return ZSTD
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A corpus file that is open.

    Attributes:
        kind: as `kind_of`.
        stored: its bytes as they are stored, whose position tells how much has been read.
        content: the same, unpacked.
    """

    kind: str | None
    stored: StoredFile
    content: BinaryIO


@contextmanager
def opened(file: SourceFile) -> Iterator[Opened]:
    """Opens a file.

    Raises:
        CorpusError: it cannot be read; also where its content is read later.
        MissingDependency: it is packed with zstd, and no package that unpacks it is installed.
    """
    with StoredFile(file) as stored, io.BufferedReader(stored, _BUFFER_BYTES) as buffered:
        kind = kind_of(buffered.peek(8))
        content: Any = buffered
        if kind == GZIP:
            content = gzip.GzipFile(fileobj=buffered)
        elif kind == ZSTD:
            arrow = pyarrow("", needed_for=f"reading zstd data ({file.where})")
            content = arrow.CompressedInputStream(arrow.PythonFile(buffered, mode="r"), "zstd")
        yield Opened(kind=kind, stored=stored, content=cast(BinaryIO, content))


@contextmanager
def unpacking(file: SourceFile, kind: str | None, unpacked: str) -> Iterator[None]:
    """Turn errors of packed data inside the block into ones that say where.

    Args:
        file: that is read in the block.
        kind: as `kind_of`.
        unpacked: what has been read of it before, in words.
    """
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        is_cut = isinstance(error, EOFError) or "runcated" in str(error)
        raise CorpusError(
            "the compressed corpus file is cut off"
            if is_cut
            else "the compressed corpus file is damaged",
            where=f"{file.where}, behind {unpacked}",
            found=f"{kind} data that ends in the middle" if is_cut else f"{kind}: {error}",
            expected=f"whole {kind} data",
            remedy=f"copy or download the file again, or {file.remedy}",
        ) from None


def with_lines_found(file: SourceFile, text_key: str) -> SourceFile:
    """Return the file; one that is called .json, packed or not, is known by its first line.

    Raises:
        CorpusError, MissingDependency: as `opened`.
    """
    if file.suffix != ".json" or file.size == 0:
        return file
    try:
        with opened(file) as source:
            line = _first_line(source.content)
        record = json.loads(line.removeprefix(UTF8_BOM))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, CorpusError):
        return file  # what cannot be read is named when it is
    is_line = isinstance(record, dict) and isinstance(record.get(text_key), str)
    return replace(file, holds_json_lines=is_line)


def _first_line(content: BinaryIO) -> bytes:
    line = b""
    while b"\n" not in line and len(line) < _LONGEST_FIRST_LINE:
        more = content.read(_BUFFER_BYTES)
        if not more:
            break
        line += more
    return line.partition(b"\n")[0]


def pyarrow(module: str, *, needed_for: str) -> Any:
    """Import the package pyarrow, or a module of it.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError:
        raise MissingDependency("pyarrow", extra="corpora", needed_for=needed_for) from None
