"""What a disk refuses, in words: the path, what is wrong with it, the room that is left, and the remedy."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill_pretrain.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 1 << 16

_ANOTHER = "or name another file or folder"
_PROBLEMS = {
    errno.ENOSPC: ("the disk is full", "free space, or name a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free space, or name a folder on another disk"),
    errno.EFBIG: ("a file may not grow as large", "raise the limit (`ulimit -f`)"),
    errno.EACCES: ("permission denied", f"correct the permissions, {_ANOTHER}"),
    errno.EPERM: ("not permitted", f"correct owner and permissions, {_ANOTHER}"),
    errno.EROFS: ("the file system is read-only", f"mount it for writing, {_ANOTHER}"),
    errno.ENOTDIR: ("a file is where a folder should be", f"move it, {_ANOTHER}"),
    errno.EISDIR: ("a folder is where a file should be", f"move it, {_ANOTHER}"),
    errno.EEXIST: ("a file is where a folder should be", f"move it, {_ANOTHER}"),
    errno.ENOENT: ("no such file or folder", "correct the path"),
    errno.ELOOP: ("a circle of symbolic links", "correct the links, or the path"),
    errno.ENAMETOOLONG: ("a name is too long", "choose a shorter one"),
    errno.EIO: ("the disk or its network failed", "look at the file system; `dmesg` may say more"),
    errno.ESTALE: ("the network file system lost a file", "look at the mount, and start again"),
    errno.EMFILE: ("too many open files", "raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("too many open files on this machine", "raise fs.file-max"),
    errno.ENOLCK: (
        "the file system has no locks",
        "use one with POSIX locks (on NFS: mount without nolock)",
    ),
}


def storage_error(
    error: OSError, where: object = None, *, needed: int | None = None
) -> StorageError:
    """Turn an error of the operating system into one that a user can act on.

    Args:
        error: as raised.
        where: file or folder, where the error does not name it.
        needed: bytes that would have had to fit, if that is known.
    """
    what, remedy = _PROBLEMS.get(
        error.errno or 0, (error.strerror or str(error), f"correct it, {_ANOTHER}")
    )
    path = _blamed(error, where)
    found = expected = None
    if error.errno in FULL and path is not None:
        found = f"{free_bytes(Path(str(path))):,} bytes free"
        expected = None if needed is None else f"{needed:,} bytes"
    return StorageError(what, where=path, found=found, expected=expected, remedy=remedy)


def problem(error: OSError, where: Path) -> str:
    """Return the reason alone, for errors that have words of their own for the rest; on a full disk the room left."""
    reason = error.strerror or str(error)
    return f"{reason}, {free_bytes(where):,} bytes free" if error.errno in FULL else reason


def is_of_storage(error: OSError) -> bool:
    """Tell whether an error is about files: it names one, or only a disk raises its kind."""
    about_disk = (*FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
    return error.filename is not None or error.errno in about_disk


@contextmanager
def naming(where: Path) -> Iterator[None]:
    """Turn errors of the operating system inside the block into StorageErrors, which name a path.

    numpy reports a short write without saying why; that it could not write tells enough.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and is_full(where):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise storage_error(error, where) from error


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write below a path, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def is_full(path: Path) -> bool:
    """Tell whether so little is left that a write has failed for it."""
    return free_bytes(path) < _PROBE_BYTES


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def missing_folders(path: Path) -> list[Path]:
    """List the folders above a path that do not exist yet, the innermost first."""
    return [folder for folder in path.absolute().parents if not folder.exists()]


def drop_empty(folders: list[Path]) -> None:
    """Remove those of the folders, the innermost first, that hold nothing; others stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def require_writable(path: Path) -> None:
    """Raise StorageError unless the file could be written now: found out by writing a little beside it.

    For a file that comes at the end of long work. Where its folder does not exist yet, the nearest one above it is
    tried: nothing is made, since other processes may be making the same folders.
    """
    if path.is_dir():
        raise storage_error(OSError(errno.EISDIR, ""), path)
    place = existing_parent(path.parent)
    probe = place / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with naming(path):
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            with suppress(OSError):
                probe.unlink()


def require_room(folder: Path, needed: int, *, what: str, remedy: str) -> None:
    """Raise StorageError where fewer bytes are free than are needed.

    Args:
        folder: where they go; it need not exist yet.
        needed: bytes.
        what: is to be written, such as "a checkpoint".
        remedy: besides freeing space.
    """
    free = free_bytes(folder)
    if free < needed:
        raise StorageError(
            f"the disk has no room for {what}",
            where=folder,
            found=f"{free:,} bytes free",
            expected=f"about {needed:,} bytes",
            remedy=f"free space, or {remedy}",
        )


def _blamed(error: OSError, where: object) -> object:
    """The path that is at fault: of a path with a file for a folder, that file."""
    path = error.filename if error.filename is not None else where
    if not isinstance(path, str | bytes | os.PathLike):
        return where  # a descriptor, or nothing
    # Of a rename, or of a file under its temporary name, what the user knows is where it should go.
    place = Path(os.fsdecode(path))
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        with suppress(OSError):
            for parent in (*reversed(place.parents), place):
                if parent.exists() and not parent.is_dir():
                    return parent
    return place
