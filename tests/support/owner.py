"""Another process that owns a file, as a job on another host would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import fcntl, json, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o666)
fcntl.lockf(fd, fcntl.LOCK_EX)
os.ftruncate(fd, 0)
os.pwrite(fd, json.dumps({"host": "node7", "pid": os.getpid(), "since": 1790000000.0}).encode(), 0)
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()  # a child that outlives its parent
    os._exit(0)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def owned_elsewhere(owner: Path) -> Iterator[subprocess.Popen[str]]:
    """Inside the block a process of its own, with a child, holds the lock of an owner file; kill it to let go."""
    owner.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _HOLD, str(owner)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()
