"""Publishing small files so that a reader sees the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def canonical_json(value: object) -> bytes:
    """Write one byte string per value: sorted keys, no spaces, ASCII, no NaN, one trailing newline."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii") + b"\n"


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish_bytes(path: Path, data: bytes) -> None:
    """Write `data` beside `path` under a unique name, make it durable, rename it into place.

    Raises:
        OSError: a write or fsync failed; `path` is as it was. A failed fsync is never retried.
    """
    with _blaming(path):
        temporary = _write_temporary(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def publish_bytes_once(path: Path, data: bytes) -> bool:
    """Write a file as `publish_bytes` does, but never replace one: of several writers exactly one gets True.

    On a file system without hard links the check and the rename are two steps, so callers compare
    what they find afterwards.
    """
    with _blaming(path):
        temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


def discard_stale_temporaries(folder: Path, *, min_age_s: float = 3600.0) -> None:
    """Delete what killed processes left of `publish_bytes`; files younger than that may be in use."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > min_age_s:
                path.unlink()
        except OSError:  # gone meanwhile, or not ours to remove
            continue


def sha256_file(path: Path, told: Callable[[], None] = lambda: None) -> str:
    """Return the lower-case hex sha256 of a file's bytes; `told` is called again and again while they are read."""
    with open(path, "rb") as file:
        return sha256_fd(file.fileno(), told)


def sha256_fd(fd: int, told: Callable[[], None] = lambda: None) -> str:
    """Return the lower-case hex sha256 of an open file, by positioned reads (the file offset stays)."""
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
        told()
    return digest.hexdigest()


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write the whole of `data` at `offset`; a short write (disk nearly full) is continued."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Errors inside the block name the file that was to be, not the one under its temporary name or a descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(path)
        raise


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
