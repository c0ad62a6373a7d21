"""Who may write a file or a folder: one process, by a lock that the kernel drops however the process ends.

A POSIX record lock, as decision 0003 says: it holds between the hosts of a shared file system, and a child that
outlives its parent does not inherit it. Such locks belong to a process and vanish when it closes *any* descriptor of
the file, so a file that this process has locked is never opened a second time here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from distill_pretrain.errors import InUse
from distill_pretrain.files.disk import drop_empty, missing_folders

OWNER = ".owner"
PATIENCE_S = 3.0
"""How long a new owner waits for the last one to go: the kernel takes a killed process's memory before its locks."""
_LOOK_INTERVAL_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NOT_OURS_TO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


class FileLock:
    """An exclusively locked file.

    Attributes:
        path: of the file.
        fd: open for reading and writing; -1 once released.
    """

    _held: ClassVar[dict[tuple[int, Path], FileLock]] = {}

    def __init__(self, path: Path, fd: int) -> None:
        """Use `FileLock.take`."""
        self.path = path
        self.fd = fd
        self._key = _key(path)
        self._held[self._key] = self

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> FileLock | None:
        """Create and lock the file; None when it is owned, by this process or by another one.

        Args:
            path: of the file; its folder exists.
            wait: until another process lets it go, however long that takes.

        Raises:
            OSError: the file cannot be made, or the file system has no locks.
        """
        if _key(path) in cls._held:
            return None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    @classmethod
    def held_here(cls, path: Path) -> FileLock | None:
        """Return the lock of a file that this process holds, if it holds one."""
        return cls._held.get(_key(path))

    def is_current(self) -> bool:
        """Tell whether the locked file still is the one under its name (not renamed or removed)."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self.fd)
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self.fd >= 0:
            self._held.pop(self._key, None)
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who owns a file, as its owner wrote into it.

    Attributes:
        host: name of the machine.
        pid: process there.
        since: seconds since 1970.
    """

    host: str
    pid: int
    since: float

    @classmethod
    def here(cls) -> Holder:
        """Describe this process as a holder, from now on."""
        return cls(host=socket.gethostname(), pid=os.getpid(), since=round(time.time(), 3))

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Read who holds a file that another process has locked; None where it has not said so."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host}, since {date}"


def try_to_own(owner: Path) -> FileLock | None:
    """Lock an owner file and note this process in it; None while somebody else, or this process, has the lock.

    Args:
        owner: `owner_of` a folder, or any other file that is there for this alone.

    Raises:
        OSError: the file cannot be made, or the file system has no locks.
    """
    while (lock := _take(owner)) is not None:
        # The owner before us may have removed the file between our opening and our locking it.
        if lock.is_current():
            # On a full disk the owner stays without a name.
            with suppress(OSError):
                os.ftruncate(lock.fd, 0)
                os.pwrite(lock.fd, json.dumps(asdict(Holder.here())).encode(), 0)
            return lock
        lock.release()
    return None


def _take(owner: Path) -> FileLock | None:
    while True:
        owner.parent.mkdir(parents=True, exist_ok=True)
        # The owner before us may remove the empty folder between our making it and our opening the file.
        with suppress(FileNotFoundError):
            return FileLock.take(owner)


def owner_of(folder: Path) -> Path:
    """Return the file by which the one who writes below a folder owns it."""
    return folder / OWNER


def owner_beside(path: Path) -> Path:
    """Return the file by which the one who makes or replaces `path` as a whole owns that name."""
    return path.with_name(f".{path.name}{OWNER}")


@contextmanager
def owning(owner: Path, *, what: Path, remedy: str) -> Iterator[None]:
    """Keep everybody else, on any host, out of blocks of the same owner file; blocks of one process may lie in another.

    Where this process may not create the file it cannot write anything beside it either, and the block just runs:
    what is finished and kept read-only can be used, and the first write says what is wrong. The same on a file system
    without locks, where jobs that write one folder at once are the user's to avoid (`distill-pretrain doctor PATH`).

    Args:
        owner: see `try_to_own`. One beside what it guards is removed in the end.
        what: the file or folder, for messages.
        remedy: for one who comes second.

    Raises:
        InUse: somebody else has it, named.
        OSError: the file cannot be made for other reasons.
    """
    if FileLock.held_here(owner) is not None:
        yield
        return
    made = missing_folders(owner)
    lock = _own_soon(owner, what, remedy)
    try:
        yield
    finally:
        if lock is not None:
            # A job that wrote nothing leaves no folder behind. Inside any other the file stays: between removing it
            # and the next look of another host, whose view of the folder may be seconds old, two could own it.
            if made and _is_alone(owner):
                owner.unlink(missing_ok=True)
                drop_empty(made)
            elif owner.name == OWNER:
                with suppress(OSError):
                    os.ftruncate(lock.fd, 0)
            else:
                owner.unlink(missing_ok=True)
            lock.release()


def _is_alone(owner: Path) -> bool:
    """Whether the owner file is all that its folder holds; not where the job has removed the folder."""
    try:
        return os.listdir(owner.parent) == [owner.name]
    except OSError:
        return False


def _own_soon(owner: Path, what: Path, remedy: str) -> FileLock | None:
    """The lock; None where there can be none."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            lock = try_to_own(owner)
        except OSError as error:
            may_not = error.errno in _NOT_OURS_TO_WRITE and not owner.exists()
            if may_not or error.errno in _NO_LOCKS:
                return None
            raise
        if lock is not None:
            return lock
        if time.monotonic() > deadline:
            raise InUse(
                "another process is writing here",
                where=what,
                found=Holder.read(owner) or "a process that did not leave its name",
                remedy=remedy,
            )
        time.sleep(_LOOK_INTERVAL_S)


def _key(path: Path) -> tuple[int, Path]:
    return os.getpid(), path.parent.resolve() / path.name
