"""The documents of a corpus's files, in one order, as units of work for any number of processes.

A text file is one document; in a JSONL file every line's `text_key` is one, in a table every row's. Plain JSONL files
of this machine are cut into slices, which whoever works on them reads itself. What can only be read from its
beginning (packed, behind a URL) is read by one process, which hands out what it unpacks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from distill_pretrain.corpus.lines import LONGEST_DOCUMENT, decode, json_document, too_long
from distill_pretrain.corpus.loss_marks import LossMarks, MarkKeys
from distill_pretrain.corpus.source_file import SourceFile, unreadable
from distill_pretrain.corpus.sources import SourceList
from distill_pretrain.corpus.tables import table_texts
from distill_pretrain.corpus.unpacking import GZIP, TABLES, ZSTD, Opened, kind_of, opened, unpacking
from distill_pretrain.errors import CorpusError

SLICE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of a plain file of this machine: all of it, or the lines that start in [start, end)."""

    file: SourceFile
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The number of the corpus's bytes that this is."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Part of a file that one process reads: the whole text, or some lines of JSONL.

    Attributes:
        file: the file.
        data: the bytes, unpacked.
        offset: of these in the unpacked file.
        first_line: number of the first of them, from 1.
        num_bytes: how much of the corpus this is, as it is stored.
    """

    file: SourceFile
    data: bytes
    offset: int
    first_line: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Texts of a table, and how much of the corpus this is, as it is stored."""

    texts: tuple[str, ...]
    num_bytes: int


Unit = Slice | Lines | Rows


def batches_of(
    sources: SourceList,
    text_key: str,
    slice_bytes: int = SLICE_BYTES,
    *,
    mark_keys: MarkKeys = MarkKeys(),  # noqa: B008 - a tuple
) -> Iterator[tuple[Unit, ...]]:
    """Groups units, in order, into work of about `slice_bytes`.

    Raises:
        CorpusError: a file that is read here cannot be, or is a table, of which `mark_keys` are not read.
        MissingDependency: the package that reads it is not installed.
    """
    batch: list[Unit] = []
    size = 0
    for file in sources.files:
        for part in units_of(file, text_key, slice_bytes, mark_keys=mark_keys):
            batch.append(part)
            size += _weight(part)
            if size >= slice_bytes:
                yield tuple(batch)
                batch, size = [], 0
    if batch:
        yield tuple(batch)


def _weight(part: Unit) -> int:
    """Estimate the bytes of text."""
    if isinstance(part, Slice):
        return part.num_bytes
    return len(part.data) if isinstance(part, Lines) else sum(map(len, part.texts))


def units_of(
    file: SourceFile,
    text_key: str,
    slice_bytes: int = SLICE_BYTES,
    *,
    mark_keys: MarkKeys = MarkKeys(),  # noqa: B008 - a tuple
) -> Iterator[Unit]:
    """Yield the parts of a file, in order."""
    if is_sliced(file):
        yield from slices_of(file, slice_bytes)
        return
    used = 0
    with opened(file) as source:
        is_table = source.kind in TABLES
        if is_table and mark_keys.any:
            raise CorpusError(
                "what the loss leaves out is read from JSON lines alone",
                where=file.where,
                found=f"a {source.kind} file, with corpus.masked_key or corpus.weight_key set",
                remedy="write it as JSONL, or leave these keys out",
            )
        read = _table(source, file, text_key) if is_table else _text(source, file, slice_bytes)
        for part in read:
            position = min(part.num_bytes, file.size)
            yield replace(part, num_bytes=position - used)
            used = position
    # Such as the footer of a table.
    yield Rows(texts=(), num_bytes=file.size - used)


def is_sliced(file: SourceFile) -> bool:
    """Tell whether any part of a file can be read alone: plain, and on this machine."""
    if file.url is not None:
        return False
    try:
        with open(file.path, "rb", buffering=0) as handle:
            return kind_of(handle.read(8)) not in (GZIP, ZSTD, *TABLES)
    except OSError as error:
        raise unreadable(file, error) from None


def slices_of(file: SourceFile, slice_bytes: int = SLICE_BYTES) -> Iterator[Slice]:
    """Yield the whole of a plain text file, or ranges of a plain JSONL file."""
    if not file.is_jsonl:
        yield Slice(file=file, start=0, end=file.size)
        return
    for start in range(0, file.size, slice_bytes):
        yield Slice(file=file, start=start, end=min(start + slice_bytes, file.size))


def _table(source: Opened, file: SourceFile, text_key: str) -> Iterator[Rows]:
    """Rows; `num_bytes` counts from the beginning of the file."""
    for texts, used in table_texts(source, file, text_key):
        yield Rows(texts=tuple(texts), num_bytes=used)


def _text(source: Opened, file: SourceFile, slice_bytes: int) -> Iterator[Lines]:
    """All of a text, or some lines of JSONL at a time; `num_bytes` counts from the beginning of the file."""
    offset, first_line, num_lines, size = 0, 1, 0, 0
    pending: list[bytes] = []
    while True:
        with unpacking(file, source.kind, f"line {num_lines} of the unpacked text"):
            chunk = source.content.read(slice_bytes)
        if not chunk:
            break
        num_lines += chunk.count(b"\n")
        size += len(chunk)
        cut = chunk.rfind(b"\n") + 1 if file.is_jsonl else 0
        pending.append(chunk[:cut] if cut else chunk)
        if size > LONGEST_DOCUMENT:
            raise too_long(file, first_line if file.is_jsonl else None)
        if cut:
            data = b"".join(pending)
            yield _lines_of(source, file, data, offset, first_line)
            offset, first_line = offset + len(data), num_lines + 1
            pending, size = [chunk[cut:]], len(chunk) - cut
    yield _lines_of(source, file, b"".join(pending), offset, first_line)


def _lines_of(source: Opened, file: SourceFile, data: bytes, offset: int, first_line: int) -> Lines:
    return Lines(
        file=file,
        data=data,
        offset=offset,
        first_line=first_line,
        num_bytes=source.stored.position,
    )


def read_documents(part: Unit, text_key: str) -> Iterator[str]:
    """Yield the non-empty documents of a unit; see `read_marked`."""
    for text, _ in read_marked(part, text_key, MarkKeys()):
        yield text


def read_marked(
    part: Unit, text_key: str, mark_keys: MarkKeys
) -> Iterator[tuple[str, LossMarks | None]]:
    """Yield the non-empty documents of a unit, and what each says of its part in the loss; None where it cannot.

    Raises:
        CorpusError: unreadable or binary file, bytes that are not UTF-8, a malformed JSONL line.
    """
    if isinstance(part, Rows):
        for text in filter(None, part.texts):
            yield text, None
    elif part.file.is_jsonl:
        for offset, line in _lines(part):
            decoded = decode(line, offset, part.file)
            number = partial(_line_number, part, offset)
            text, marks = json_document(decoded, part.file, text_key, mark_keys, number)
            if text:
                yield text, marks
    else:
        data = part.data if isinstance(part, Lines) else _read_text(part.file)
        if data:
            yield decode(data, 0, part.file), None


def read_sample(part: Slice, text_key: str) -> Iterator[str]:
    """Read the text of the lines that start in a slice; a text file need not be read whole."""
    if part.file.is_jsonl:
        yield from read_documents(part, text_key)
        return
    text = "".join(decode(line, offset, part.file) for offset, line in _lines(part))
    if text:
        yield text


def _lines(part: Slice | Lines) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every line that starts in the unit."""
    if isinstance(part, Lines):
        offset = part.offset
        for line in io.BytesIO(part.data):
            yield offset, line
            offset += len(line)
        return
    try:
        with open(part.file.path, "rb") as file:
            offset = part.start
            if offset:
                # The line that runs over the border belongs to the slice before, unless it ends right at it.
                file.seek(offset - 1)
                offset += len(file.readline()) - 1
            while offset < part.end:
                line = file.readline(LONGEST_DOCUMENT + 1)
                if not line:
                    return
                if len(line) > LONGEST_DOCUMENT:
                    raise too_long(part.file, _line_number(part, offset))
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise unreadable(part.file, error) from None


def _read_text(file: SourceFile) -> bytes:
    if file.size > LONGEST_DOCUMENT:
        raise too_long(file, None)
    try:
        with open(file.path, "rb") as handle:
            return handle.read(file.size)
    except OSError as error:
        raise unreadable(file, error) from None


def _line_number(part: Slice | Lines, offset: int) -> int:
    """Number, from 1, of the line at an offset of the file; what is before it is read to count."""
    if isinstance(part, Lines):
        return part.first_line + part.data.count(b"\n", 0, offset - part.offset)
    number = 1
    with open(part.file.path, "rb") as handle:
        while offset > 0 and (chunk := handle.read(min(offset, 1 << 20))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number
