"""Which files make up a corpus, and the documents in them.

A text file is one document; in a JSONL file every line's `text_key` is one. Files are cut into slices, so that a
large JSONL file keeps many processes busy; slices and documents have one order, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from distill_pretrain.corpus.config import CorpusConfig
from distill_pretrain.errors import CorpusError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
SLICE_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus.

    Attributes:
        path: where it is.
        size: bytes.
        from_directory: found in a directory, so that `corpus.exclude` can leave it out.
    """

    path: Path
    size: int
    from_directory: bool

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document of its own."""
        return self.path.suffix.lower() in JSONL_SUFFIXES

    @property
    def remedy(self) -> str:
        """What to do about a file that is not text."""
        if self.from_directory:
            return f"leave it out, for example corpus.exclude=['{self.path.name}']"
        return "remove it from corpus.paths, or convert it to UTF-8 text"


@dataclass(frozen=True, kw_only=True)
class SourceList:
    """The files of a corpus in their order, and what was left out.

    Attributes:
        files: non-empty files.
        num_empty: empty files met inside directories.
        num_repeated: files reached by more than one entry of `corpus.paths`; each is read once.
    """

    files: tuple[SourceFile, ...]
    num_empty: int
    num_repeated: int

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """sha256 over names and sizes in order: tells whether files came, went or grew."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of a file: all of it, or the lines that start in [start, end)."""

    file: SourceFile
    start: int
    end: int


def list_sources(corpus: CorpusConfig) -> SourceList:
    """Finds the corpus's files.

    Raises:
        CorpusError: a path is missing, a named file is empty, a directory has no matching file.
    """
    output = corpus.output_dir.resolve()
    found: dict[Path, SourceFile] = {}
    num_empty = num_repeated = 0
    for path in corpus.paths:
        for file in _files_of(path, corpus, output):
            key = file.path.resolve()
            if key in found:
                num_repeated += 1
            elif file.size == 0:
                num_empty += 1
            else:
                found[key] = file
    if not found:
        raise CorpusError(
            "the corpus is empty",
            where="corpus.paths",
            found=f"{num_empty} files, all of them empty",
            expected="at least one file with text",
        )
    return SourceList(files=tuple(found.values()), num_empty=num_empty, num_repeated=num_repeated)


def _files_of(path: Path, corpus: CorpusConfig, output: Path) -> list[SourceFile]:
    if path.is_dir():
        files = _files_below(path, corpus, output)
        if not files:
            raise CorpusError(
                "no file of this directory belongs to the corpus",
                where=path,
                expected=f"names matching corpus.include {list(corpus.include)}, "
                f"not corpus.exclude {list(corpus.exclude)}",
                remedy="set corpus.include, for example corpus.include=['*.py']",
            )
        return files
    if not path.exists():
        raise CorpusError(
            "corpus file not found",
            where=path,
            remedy=f"correct corpus.paths (relative paths start at {Path.cwd()})",
        )
    size = path.stat().st_size
    if size == 0:
        raise CorpusError("corpus file is empty", where=path, remedy="remove it from corpus.paths")
    return [SourceFile(path=path, size=size, from_directory=False)]


def _files_below(root: Path, corpus: CorpusConfig, output: Path) -> list[SourceFile]:
    def unreadable(error: OSError) -> None:
        raise CorpusError(
            "directory cannot be read", where=error.filename, found=error.strerror
        ) from error

    files: list[tuple[tuple[str, ...], SourceFile]] = []
    for folder, folder_names, file_names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        if here.resolve() == output and here != root:
            folder_names.clear()
            continue
        relative = here.relative_to(root)
        folder_names[:] = [
            name for name in folder_names if not _excluded(relative / name, corpus.exclude)
        ]
        for name in file_names:
            below = relative / name
            if not any(fnmatchcase(name, pattern) for pattern in corpus.include):
                continue
            if _excluded(below, corpus.exclude):
                continue
            path = root / below
            if not path.exists():
                raise CorpusError(
                    "broken link in a corpus directory",
                    where=path,
                    remedy=f"leave it out: corpus.exclude=['{name}']",
                )
            if path.is_file():
                source = SourceFile(path=path, size=path.stat().st_size, from_directory=True)
                files.append((below.parts, source))
    return [source for _, source in sorted(files, key=lambda item: item[0])]


def _excluded(relative: Path, patterns: Sequence[str]) -> bool:
    return any(
        fnmatchcase(relative.name, pattern) or fnmatchcase(relative.as_posix(), pattern)
        for pattern in patterns
    )


def slices_of(file: SourceFile, slice_bytes: int = SLICE_BYTES) -> Iterator[Slice]:
    """The whole of a text file, or ranges of a JSONL file."""
    if not file.is_jsonl:
        yield Slice(file=file, start=0, end=file.size)
        return
    for start in range(0, file.size, slice_bytes):
        yield Slice(file=file, start=start, end=min(start + slice_bytes, file.size))


def batches_of(sources: SourceList, slice_bytes: int = SLICE_BYTES) -> Iterator[tuple[Slice, ...]]:
    """Groups slices, in order, into units of work of about `slice_bytes`."""
    batch: list[Slice] = []
    size = 0
    for file in sources.files:
        for part in slices_of(file, slice_bytes):
            batch.append(part)
            size += part.end - part.start
            if size >= slice_bytes:
                yield tuple(batch)
                batch, size = [], 0
    if batch:
        yield tuple(batch)


def read_documents(part: Slice, text_key: str) -> Iterator[str]:
    """The non-empty documents of a slice.

    Raises:
        CorpusError: unreadable or binary file, bytes that are not UTF-8, a malformed JSONL line.
    """
    if not part.file.is_jsonl:
        text = _decode(_read(part.file, 0, part.file.size), 0, part.file)
        if text:
            yield text
        return
    for offset, line in _lines(part):
        text = _json_text(_decode(line, offset, part.file), offset, part.file, text_key)
        if text:
            yield text


def read_sample(part: Slice, text_key: str) -> Iterator[str]:
    """Text of the lines that start in a slice; a text file need not be read whole."""
    if part.file.is_jsonl:
        yield from read_documents(part, text_key)
        return
    text = "".join(_decode(line, offset, part.file) for offset, line in _lines(part))
    if text:
        yield text


def _lines(part: Slice) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every line that starts in the slice."""
    try:
        with part.file.path.open("rb") as file:
            offset = part.start
            if offset:
                # The line that runs over the border belongs to the slice before, unless it ends right at it.
                file.seek(offset - 1)
                offset += len(file.readline()) - 1
            while offset < part.end:
                line = file.readline()
                if not line:
                    return
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise _unreadable(part.file, error) from None


def _read(file: SourceFile, start: int, size: int) -> bytes:
    try:
        with file.path.open("rb") as handle:
            handle.seek(start)
            return handle.read(size)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: SourceFile, error: OSError) -> CorpusError:
    return CorpusError(
        "corpus file cannot be read", where=file.path, found=error.strerror, remedy=file.remedy
    )


def _decode(data: bytes, offset: int, file: SourceFile) -> str:
    if offset == 0 and data.startswith(UTF8_BOM):
        data, offset = data[len(UTF8_BOM) :], len(UTF8_BOM)
    zero = data.find(b"\0")
    if zero >= 0:
        raise CorpusError(
            "corpus file is not text",
            where=file.path,
            found=f"a NUL byte at offset {offset + zero} (binary data, or UTF-16)",
            expected="UTF-8 text",
            remedy=file.remedy,
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            "corpus file is not UTF-8",
            where=file.path,
            found=f"byte 0x{data[error.start]:02x} at offset {offset + error.start}",
            expected="UTF-8 text",
            remedy=file.remedy,
        ) from None


def _json_text(line: str, offset: int, file: SourceFile, text_key: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad_line("JSONL line is not JSON", file, offset, line.strip()[:60]) from None
    if not isinstance(record, dict):
        raise _bad_line("JSONL line is not an object", file, offset, line.strip()[:60])
    if text_key not in record:
        error = _bad_line(
            f"JSONL line lacks the key {text_key!r}",
            file,
            offset,
            f"keys {sorted(record)}",
            remedy="set corpus.text_key to the key of the text",
        )
        raise error
    text = record[text_key]
    if not isinstance(text, str):
        what = f"JSONL value of {text_key!r} is not text"
        raise _bad_line(what, file, offset, type(text).__name__)
    if not _is_encodable(text):
        what = f"JSONL value of {text_key!r} holds half of a surrogate pair"
        raise _bad_line(what, file, offset, "a lone \\ud800-\\udfff escape")
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad_line(
    what: str, file: SourceFile, offset: int, found: str, remedy: str | None = None
) -> CorpusError:
    with file.path.open("rb") as handle:
        number = 1
        while offset > 0:
            chunk = handle.read(min(offset, 1 << 20))
            if not chunk:
                break
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return CorpusError(what, where=f"{file.path}:{number}", found=found, remedy=remedy)
