"""Who trains what: two jobs of one comparison never train the same model at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pretrain.processes.process import on_first_rank

FILE = ".lease"


@contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Whether this job alone may write `folder` while the block runs; every rank calls it.

    A lock on a file, held by rank 0: it ends with the process, however that ends, so a killed job leaves nothing to
    clean up. Across nodes it needs a file system whose locks reach all of them (`distill-pretrain doctor PATH` says).
    """
    descriptors: list[int] = []

    def take() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # flock, where the cache's writers use lockf: it also excludes this process's other leases.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        descriptors.append(descriptor)
        return True

    try:
        yield on_first_rank(take)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
