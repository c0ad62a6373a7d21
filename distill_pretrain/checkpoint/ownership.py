"""A job of several processes owns what it writes, in a folder that all of them see.

Rank 0 holds the lock, and every rank learns of it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from distill_pretrain.errors import ConfigError
from distill_pretrain.files.ownership import FileLock, owner_of, owning, try_to_own
from distill_pretrain.processes.process import on_first_rank

SHARED_FOLDER_WAIT_S = 10.0


@contextmanager
def job_owning(owner: Path, *, what: Path, remedy: str) -> Iterator[None]:
    """Own a path for the whole job, as `files.ownership.owning` does for one process.

    Every rank calls it, and raises what rank 0 finds.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(owning(owner, what=what, remedy=remedy))

        on_first_rank(enter)
        yield


@contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Yield whether this job alone may write a run folder while the block runs; every rank calls it.

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


def require_shared_folder(folder: Path) -> None:
    """Raise ConfigError on every rank unless all of them see the same `folder`; it is created."""

    def leave_mark() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".seen-by-all-{uuid.uuid4().hex}"
        mark.touch()
        return mark

    mark = on_first_rank(leave_mark)
    deadline = time.monotonic() + SHARED_FOLDER_WAIT_S
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    import torch.distributed as dist

    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, mark.exists())
    on_first_rank(mark.unlink)
    blind = [rank for rank, sees_mark in enumerate(seen) if not sees_mark]
    if blind:
        raise ConfigError(
            "the output folder is not the same on every node",
            where=folder,
            found=f"ranks {', '.join(map(str, blind))} do not see what rank 0 writes",
            expected="a folder on a shared file system",
            remedy="set train.output_dir to one",
        )
