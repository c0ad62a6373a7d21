"""Names the process that a job waits for, and ends the job, where a collective would wait in silence."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from json import dumps, loads
from typing import Any

import torch.distributed as dist

STUCK_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: worth another try
_OF_FILES = ("reading", "writing", "saving", "loading", "exporting", "checkpoint")
"""Activities that wait for a disk, not for other ranks."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank last said of itself.

    Attributes:
        rank: global.
        host: its machine.
        pid: its process.
        doing: such as "step 12: reading".
        since: seconds in that when it said so.
        count: how often it has spoken.
    """

    rank: int
    host: str
    pid: int
    doing: str
    since: float
    count: int


class Watchdog:
    """Publishes what this rank is doing; ends the process when nothing has moved anywhere for too long.

    Args:
        store: key-value store of the job, this thread's own client.
        timeout: seconds without progress of any rank after which the job counts as stuck.
        end: ends the process.
    """

    def __init__(
        self, store: dist.Store, timeout: float, end: Callable[[int], None] = os._exit
    ) -> None:
        self._store = store
        self._timeout = timeout
        self._end = end
        self._interval = min(10.0, timeout / 4)
        self._doing = "starting"
        self._changed = time.monotonic()
        # How often this rank has moved; how often all had when this thread last looked, and when it saw that grow.
        self._moves = self._told = 0
        self._of_all = 0
        self._moved = time.monotonic()
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, what: str) -> None:
        """Say what this rank does from now on."""
        self._doing = what
        self._changed = time.monotonic()
        self._moves += 1

    def alive(self) -> None:
        """Say that what this rank does goes on."""
        self._moves += 1

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(timeout=self._interval + 5)

    def _watch(self) -> None:
        # The first look at once: a rank that is stopped before its second is known to the others by then.
        while True:
            # Where rank 0 keeps the store, it is gone with rank 0.
            with suppress(dist.DistError):
                self._look()
            if self._is_stuck() and (report := self._last_words()) is not None:
                print(report, file=sys.stderr, flush=True)
                self._end(STUCK_EXIT_CODE)
                return
            if self._stop.wait(self._interval):
                return

    def _last_words(self) -> str | None:
        """See `_watched_report`; also where the store is gone."""
        try:
            return self._watched_report()
        except dist.DistError as error:
            return f"{self._complaint()}\n  the store of the job does not answer: rank 0 is gone ({error})"

    def _is_stuck(self) -> bool:
        return time.monotonic() - self._moved > self._timeout

    def _look(self) -> None:
        """Publish this rank's heartbeat and moves, and see whether any rank has moved since the last look."""
        moves = self._moves
        own, self._told = moves - self._told, moves
        if own:
            self._moved = time.monotonic()
        self._publish()
        # One sum over all ranks: a look costs the same in a job of any size.
        of_all = self._store.add("moves", own)
        if of_all != self._of_all:
            self._of_all = of_all
            self._moved = time.monotonic()

    def _watched_report(self) -> str | None:
        """The report after a second look at everybody; None where some rank moved, or the block was left, meanwhile."""
        before = self._heard()
        # The others may be waiting here too, and must go on being heard.
        for _ in range(3):
            if self._stop.wait(self._interval):
                return None
            self._look()
            if not self._is_stuck():
                return None
        report = self._report(before, self._heard())
        self._look()
        return report if self._is_stuck() else None

    def _complaint(self) -> str:
        return (
            f"error: no progress for {self._timeout:.0f} s; rank {dist.get_rank()} is at "
            f'"{self._doing}" and ends its process'
        )

    def _publish(self) -> None:
        self._count += 1
        heartbeat = Heartbeat(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            pid=os.getpid(),
            doing=self._doing,
            since=time.monotonic() - self._changed,
            count=self._count,
        )
        self._store.set(f"heartbeat/{heartbeat.rank}", dumps(asdict(heartbeat)))

    def _heard(self) -> dict[int, Heartbeat]:
        keys = {rank: f"heartbeat/{rank}" for rank in range(dist.get_world_size())}
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Heartbeat(**loads(self._store.get(key))) for rank, key in there.items()}

    def _report(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> str:
        """Who is silent, and who does something else than the others.

        A rank that lives has spoken between the two looks; one that waits in a collective says the same as most.
        """
        own = dist.get_rank()
        silent = [
            rank
            for rank in range(dist.get_world_size())
            if rank != own and (rank not in now or now[rank] == before.get(rank))
        ]
        live = [heartbeat for rank, heartbeat in sorted(now.items()) if rank not in silent]
        lines = [self._complaint()]
        for rank in silent:
            last = now.get(rank)
            known = (
                f'pid {last.pid} on {last.host}, last at "{last.doing}"'
                if last
                else "never heard of"
            )
            lines.append(f"  rank {rank} is silent: dead, stopped, or cut off ({known})")
        most = max((b.doing for b in live), key=[b.doing for b in live].count)
        for heartbeat in live:
            if heartbeat.doing != most:
                lines.append(
                    f'  rank {heartbeat.rank} (pid {heartbeat.pid} on {heartbeat.host}) is at "{heartbeat.doing}" for '
                    f'{heartbeat.since:.0f} s; most ranks are at "{most}"'
                )
        if len(lines) == 1:
            what = "file system" if any(word in most for word in _OF_FILES) else "network"
            lines.append(
                f'  all ranks are live and at "{most}": look at the {what}, or raise train.stuck_after_s'
            )
        return "\n".join(lines)


@contextmanager
def watchdog(timeout: float | None) -> Iterator[Callable[[str], None]]:
    """Watch the block; yield what to call with each new activity.

    Args:
        timeout: seconds without a new activity after which the process reports the ranks it waits for and ends, with
            STUCK_EXIT_CODE; None, or a job of one process, watches nothing.
    """
    global _current
    if timeout is None or dist.get_world_size() == 1:
        yield lambda what: None
        return
    store: Any = dist.distributed_c10d._get_default_store()
    # A client of its own, so that no wait of the main thread keeps this one from speaking.
    dog = Watchdog(store.clone() if hasattr(store, "clone") else store, timeout)
    dog.start()
    before, _current = _current, dog
    try:
        yield dog.doing
    finally:
        _current = before
        dog.close()


_current: Watchdog | None = None


def alive() -> None:
    """Say that work which takes long on one rank goes on: a disk, above all.

    The call is cheap, and allowed from any thread, whether or not a watchdog looks on.
    """
    dog = _current
    if dog is not None:
        dog.alive()
