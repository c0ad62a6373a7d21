"""Which files make up a corpus: named ones, and those below folders, on a disk or in an object store."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol

from distill_pretrain.corpus.config import CorpusConfig
from distill_pretrain.corpus.source_file import SourceFile, unreadable
from distill_pretrain.corpus.unpacking import with_lines_found
from distill_pretrain.corpus.urls import Store
from distill_pretrain.errors import CorpusError
from distill_pretrain.files.storage import is_remote

DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"


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
        """The size of all files as they are stored."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Return the sha256 over names and sizes in order: it tells whether files came, went or grew."""
        digest = hashlib.sha256()
        for file in self.files:
            lines = "\0lines" if file.holds_json_lines else ""
            digest.update(_bytes(f"{file.path.name}\0{file.size}{lines}\n"))
        return digest.hexdigest()

    def stamp(self) -> str:
        """Return the sha256 over names, sizes and times in order: while it is the same, so are the contents."""
        digest = hashlib.sha256()
        for file in self.files:
            version = file.version if file.url else file.modified_ns
            digest.update(_bytes(f"{file.path.name}\0{file.size}\0{version}\n"))
        return digest.hexdigest()

    def content_sha256(self) -> str:
        """Return the sha256 over the contents in order; every local file is read, and a store's word taken for its own.

        Raises:
            CorpusError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            content = hashlib.sha256(_bytes(f"{file.url}\0{file.version}") if file.url else b"")
            if file.url is None:
                try:
                    with open(file.path, "rb") as handle:
                        while chunk := handle.read(1 << 20):
                            content.update(chunk)
                except OSError as error:
                    raise unreadable(file, error) from None
            digest.update(content.digest())
        return digest.hexdigest()

    def is_unchanged(self) -> bool:
        """Tell whether every file still has the size and time that it was found with."""
        try:
            return all(file.is_unchanged() for file in self.files)
        except (OSError, CorpusError):
            return False


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


class _Folder(Protocol):
    """A directory of a disk or a store."""

    where: str

    def walk(self, exclude: Sequence[str]) -> Iterator[tuple[PurePath, list[str]]]:
        """Every folder below, relative to this one, with the names of its files."""
        ...

    def source(self, below: PurePath) -> SourceFile | None:
        """A file of it; None for what is none."""
        ...

    def read(self, below: PurePath) -> bytes:
        """Contents of a small file."""
        ...


def list_sources(corpus: CorpusConfig) -> SourceList:
    """Finds the corpus's files.

    Raises:
        CorpusError: a path is missing, a named file is empty, a directory has no matching file.
        MissingDependency: the package that reads a URL or the first line of a packed file is not installed.
    """
    found: dict[object, SourceFile] = {}
    num_empty = num_repeated = 0
    left_out: Counter[str] = Counter()
    for path in corpus.paths:
        for file in _files_of(path, corpus, left_out):
            key = file.url or Path(file.path).resolve()
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
        files=tuple(with_lines_found(file, corpus.text_key) for file in found.values()),
        num_empty=num_empty,
        num_repeated=num_repeated,
        left_out=left_out,
    )


def _files_of(path: Path | str, corpus: CorpusConfig, left_out: Counter[str]) -> list[SourceFile]:
    folder: _Folder
    if is_remote(path):
        store = Store(str(path))
        if not store.is_folder():
            return [_named(SourceFile.remote(store.url, store.info(), from_directory=False))]
        folder = _RemoteFolder(store)
    else:
        path = Path(path)
        if not path.exists():
            raise CorpusError(
                "corpus file not found",
                where=path,
                remedy=f"correct corpus.paths (relative paths start at {Path.cwd()})",
            )
        if not path.is_dir():
            return [_named(SourceFile.local(path, from_directory=False))]
        folder = _LocalFolder(path, corpus.output_dir.resolve())
    files = _files_below(folder, corpus, left_out)
    if not files:
        raise CorpusError(
            "no file of this directory belongs to the corpus",
            where=path,
            expected=f"names matching corpus.include {list(corpus.include)}, "
            f"not corpus.exclude {list(corpus.exclude)}",
            remedy="set corpus.include, for example corpus.include=['*.py']",
        )
    return files


def _named(file: SourceFile) -> SourceFile:
    if file.size == 0:
        raise CorpusError(
            "corpus file is empty", where=file.where, remedy="remove it from corpus.paths"
        )
    return file


class _LocalFolder:
    """A directory of this machine.

    Args:
        root: the directory.
        output: folder of the tokens, which is no part of the corpus.
    """

    def __init__(self, root: Path, output: Path) -> None:
        self.where = str(root)
        self._root = root
        self._output = output

    def walk(self, exclude: Sequence[str]) -> Iterator[tuple[PurePath, list[str]]]:
        """Every folder with the names of its files; linked folders too, each folder once.

        A folder that is there and linked as well is met where it is. Links that lead back up are not followed.
        """

        def stop(error: OSError) -> None:
            raise CorpusError(
                "directory cannot be read", where=error.filename, found=error.strerror
            ) from error

        root = self._root
        seen = set(root.resolve().parents)
        tops = [root]
        for top in tops:  # grows on the way
            for folder, folder_names, file_names in os.walk(top, onerror=stop):
                here = Path(folder)
                real = here.resolve()
                if real in seen or (real == self._output and here != root):
                    folder_names.clear()
                    continue
                seen.add(real)
                relative = here.relative_to(root)
                folder_names[:] = sorted(
                    name for name in folder_names if not _excluded(relative / name, exclude)
                )
                tops += [here / name for name in folder_names if (here / name).is_symlink()]
                yield relative, file_names

    def source(self, below: PurePath) -> SourceFile | None:
        """A file; None for pipes and devices."""
        path = self._root / below
        if not path.exists():
            raise CorpusError(
                "broken link in a corpus directory",
                where=path,
                remedy=f"leave it out: corpus.exclude=['{path.name}']",
            )
        return SourceFile.local(path, from_directory=True) if path.is_file() else None

    def read(self, below: PurePath) -> bytes:
        """Contents of a small file."""
        return (self._root / below).read_bytes()


class _RemoteFolder:
    """A folder of an object store, or of what a web server lists."""

    def __init__(self, store: Store) -> None:
        self.where = store.url.rstrip("/")
        self._store = store
        root = PurePosixPath(store.root)
        self._found = {
            PurePosixPath(path).relative_to(root): (path, info)
            for path, info in store.find().items()
        }

    def walk(self, exclude: Sequence[str]) -> Iterator[tuple[PurePath, list[str]]]:
        """Every folder with the names of its files."""
        folders: dict[PurePosixPath, list[str]] = {}
        for below in sorted(self._found):
            if not any(_excluded(folder, exclude) for folder in below.parents[:-1]):
                folders.setdefault(below.parent, []).append(below.name)
        # Of a dataset of several splits the top has a file of its own, so that it comes first.
        yield from sorted(folders.items())

    def source(self, below: PurePath) -> SourceFile | None:
        """A file."""
        path, info = self._found[PurePosixPath(below)]
        return SourceFile.remote(self._store.url_of(path), info, from_directory=True)

    def read(self, below: PurePath) -> bytes:
        """Contents of a small file."""
        return self._store.read(self._found[PurePosixPath(below)][0])


def _files_below(folder: _Folder, corpus: CorpusConfig, left_out: Counter[str]) -> list[SourceFile]:
    files: list[tuple[tuple[str, ...], SourceFile]] = []
    for relative, file_names in folder.walk(corpus.exclude):
        of_dataset = _dataset_files(folder, relative, file_names, corpus.exclude)
        for name in file_names:
            below = relative / name
            if _excluded(below, corpus.exclude):
                continue
            if of_dataset is not None and name not in of_dataset:
                continue
            if of_dataset is None and not any(fnmatchcase(name, p) for p in corpus.include):
                left_out[f"*{below.suffix.lower()}" if below.suffix else "without suffix"] += 1
                continue
            source = folder.source(below)
            if source is None:
                left_out["pipes and devices"] += 1
            else:
                files.append((below.parts, source))
    return [source for _, source in sorted(files, key=lambda item: item[0])]


def _excluded(relative: PurePath, patterns: Sequence[str]) -> bool:
    return any(
        fnmatchcase(relative.name, pattern) or fnmatchcase(relative.as_posix(), pattern)
        for pattern in patterns
    )


def _dataset_files(
    folder: _Folder, relative: PurePath, names: Sequence[str], exclude: Sequence[str]
) -> set[str] | None:
    """Arrow files of a folder that Hugging Face's `Dataset.save_to_disk` wrote; None of any other folder.

    The library leaves its caches (cache-*.arrow) in there too. Of a folder of several splits it cannot be told
    which of them is to be trained on.
    """
    where = f"{folder.where}/{relative.as_posix()}".removesuffix("/.")
    if DATASET_SPLITS in names:
        named = _read_json(folder, relative / DATASET_SPLITS, where).get("splits")
        splits = [str(split) for split in named] if isinstance(named, list) else []
        splits = [split for split in splits if not _excluded(relative / split, exclude)]
        if len(splits) > 1:
            raise CorpusError(
                "the folder holds several splits of a dataset",
                where=where,
                found=", ".join(splits),
                expected="one split",
                remedy=f"name it in corpus.paths, such as {where}/{splits[0]}, or leave the others out "
                f"(corpus.exclude=['{splits[-1]}'])",
            )
    if DATASET_STATE not in names or not any(name.endswith(".arrow") for name in names):
        return None
    state = _read_json(folder, relative / DATASET_STATE, where)
    try:
        listed = {str(entry["filename"]) for entry in state["_data_files"]}
    except (KeyError, TypeError):
        return None
    if state.get("_indices_data_files"):
        raise CorpusError(
            "the dataset is a selection of its rows, which is not read",
            where=where,
            found=f"_indices_data_files in {DATASET_STATE}",
            remedy="save it again with load_from_disk(...).flatten_indices().save_to_disk(...)",
        )
    missing = listed - set(names)
    if missing:
        raise CorpusError(
            "a file of the dataset is missing",
            where=where,
            found=f"no {min(missing)}",
            expected=f"the {len(listed)} files that {DATASET_STATE} names",
            remedy="copy the folder again",
        )
    return listed


def _read_json(folder: _Folder, below: PurePath, where: str) -> dict[str, Any]:
    try:
        state = json.loads(folder.read(below))
    except (OSError, ValueError) as error:
        raise CorpusError(
            "the description of a dataset cannot be read",
            where=f"{where}/{below.name}",
            found=str(error).splitlines()[0],
            remedy="copy the folder again",
        ) from None
    return state if isinstance(state, dict) else {}
