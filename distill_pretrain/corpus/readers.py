"""Which files make up a corpus, and the documents in them.

A text file is one document; in a JSONL file every line's `text_key` is one. Files are cut into slices, so that a
large JSONL file keeps many processes busy; slices and documents have one order, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from distill_pretrain.corpus.config import CorpusConfig
from distill_pretrain.errors import CorpusError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
SLICE_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus.

    Attributes:
        path: where it is.
        size: bytes.
        modified_ns: time of its last change, ns since 1970.
        from_directory: found in a directory, so that `corpus.exclude` can leave it out.
        holds_json_lines: its first line is an object with the text, whatever it is called.
    """

    path: Path
    size: int
    modified_ns: int
    from_directory: bool
    holds_json_lines: bool = False

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document of its own."""
        return self.holds_json_lines or self.path.suffix.lower() in JSONL_SUFFIXES

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
        left_out: kind, such as "*.gz" -> files met inside directories that `corpus.include` does not match.
    """

    files: tuple[SourceFile, ...]
    num_empty: int
    num_repeated: int
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """sha256 over names and sizes in order: tells whether files came, went or grew."""
        digest = hashlib.sha256()
        for file in self.files:
            lines = "\0lines" if file.holds_json_lines else ""
            digest.update(_bytes(f"{file.path.name}\0{file.size}{lines}\n"))
        return digest.hexdigest()

    def stamp(self) -> str:
        """sha256 over names, sizes and times in order: while it is the same, so are the contents."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(_bytes(f"{file.path.name}\0{file.size}\0{file.modified_ns}\n"))
        return digest.hexdigest()

    def content_sha256(self) -> str:
        """sha256 over the contents in order; reads every file.

        Raises:
            CorpusError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            try:
                with file.path.open("rb") as handle:
                    content = hashlib.sha256()
                    while chunk := handle.read(1 << 20):
                        content.update(chunk)
            except OSError as error:
                raise _unreadable(file, error) from None
            digest.update(content.digest())
        return digest.hexdigest()

    def is_unchanged(self) -> bool:
        """Whether every file still has the size and time that it was found with."""
        try:
            found = [file.path.stat() for file in self.files]
        except OSError:
            return False
        return all(
            (status.st_size, status.st_mtime_ns) == (file.size, file.modified_ns)
            for status, file in zip(found, self.files, strict=True)
        )


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


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
    left_out: Counter[str] = Counter()
    for path in corpus.paths:
        for file in _files_of(path, corpus, output, left_out):
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
    return SourceList(
        files=tuple(found.values()),
        num_empty=num_empty,
        num_repeated=num_repeated,
        left_out=left_out,
    )


def _files_of(
    path: Path, corpus: CorpusConfig, output: Path, left_out: Counter[str]
) -> list[SourceFile]:
    if path.is_dir():
        files = _files_below(path, corpus, output, left_out)
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
    file = _source(path, corpus.text_key, from_directory=False)
    if file.size == 0:
        raise CorpusError("corpus file is empty", where=path, remedy="remove it from corpus.paths")
    return [file]


def _source(path: Path, text_key: str, *, from_directory: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(
        path=path,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        from_directory=from_directory,
        holds_json_lines=path.suffix.lower() == ".json" and _holds_json_lines(path, text_key),
    )


def _holds_json_lines(path: Path, text_key: str) -> bool:
    try:
        with path.open("rb") as handle:
            line = handle.readline()
        record = json.loads(line.removeprefix(UTF8_BOM))
    except (OSError, ValueError, RecursionError):  # what cannot be read is named when it is
        return False
    return isinstance(record, dict) and isinstance(record.get(text_key), str)


def _walk(root: Path, corpus: CorpusConfig, output: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below a directory with the names of its files; linked folders too, each folder once.

    A folder that is there and linked as well is met where it is. Links that lead back up are not followed.
    """

    def unreadable(error: OSError) -> None:
        raise CorpusError(
            "directory cannot be read", where=error.filename, found=error.strerror
        ) from error

    seen = set(root.resolve().parents)
    tops = [root]
    for top in tops:  # grows on the way
        for folder, folder_names, file_names in os.walk(top, onerror=unreadable):
            here = Path(folder)
            real = here.resolve()
            if real in seen or (real == output and here != root):
                folder_names.clear()
                continue
            seen.add(real)
            relative = here.relative_to(root)
            folder_names[:] = sorted(
                name for name in folder_names if not _excluded(relative / name, corpus.exclude)
            )
            tops += [here / name for name in folder_names if (here / name).is_symlink()]
            yield relative, file_names


def _files_below(
    root: Path, corpus: CorpusConfig, output: Path, left_out: Counter[str]
) -> list[SourceFile]:
    files: list[tuple[tuple[str, ...], SourceFile]] = []
    for relative, file_names in _walk(root, corpus, output):
        for name in file_names:
            below = relative / name
            if _excluded(below, corpus.exclude):
                continue
            if not any(fnmatchcase(name, pattern) for pattern in corpus.include):
                left_out[f"*{below.suffix.lower()}" if below.suffix else "without suffix"] += 1
                continue
            path = root / below
            if not path.exists():
                raise CorpusError(
                    "broken link in a corpus directory",
                    where=path,
                    remedy=f"leave it out: corpus.exclude=['{name}']",
                )
            if path.is_file():
                source = _source(path, corpus.text_key, from_directory=True)
                files.append((below.parts, source))
            else:
                left_out["pipes and devices"] += 1
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
    packed = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if offset == 0 and packed is not None:
        raise CorpusError(
            "corpus file is not text",
            where=file.path,
            found=f"{packed} data",
            expected="UTF-8 text",
            remedy=f"unpack it first, or {file.remedy}",
        )
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
