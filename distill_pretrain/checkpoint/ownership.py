"""A job of several processes owns what it writes: rank 0 holds the lock, and every rank learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distill_pretrain.files.ownership import FileLock, owner_of, owning, try_to_own
from distill_pretrain.processes.process import on_first_rank


@contextmanager
def job_owning(owner: Path, *, what: Path, remedy: str) -> Iterator[None]:
    """As `files.ownership.owning`, for the whole job; every rank calls it, and raises what rank 0 finds."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(owning(owner, what=what, remedy=remedy))

        on_first_rank(enter)
        yield


@contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Whether this job alone may write a run folder while the block runs; every rank calls it.

    Unlike `job_owning` it does not wait for another owner, and keeps out other blocks of this process, too.
    """
    held: list[FileLock] = []

    def take() -> bool:
        lock = try_to_own(owner_of(folder))
        if lock is not None:
            held.append(lock)
        return lock is not None

    try:
        yield on_first_rank(take)
    finally:
        for lock in held:
            lock.release()
