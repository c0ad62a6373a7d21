"""How fast a capture goes: counters, a JSONL file, the end of the whole capture in sight.

Every process that writes shards has a file of its own, CACHE/.telemetry/HOST-PID-TIME.jsonl; readers of a cache look at
the files of its folder only, not into folders. A line is written in one piece, and lost telemetry stops nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill_pretrain.cache.names import shards_in
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import LogitsChunk, Replica, TeacherEngine
from distill_pretrain.processes.logs import ANY_RANK

_log = logging.getLogger(__name__)

FOLDER = ".telemetry"
INTERVAL_S = 10.0
RATE_OVER_S = 600.0
"""The end of the capture is foretold from the progress of all replicas within this time."""
LEAST_COST = 50
"""Looking at the folder may take a 50th of the time: it has a file or two for every shard."""


class Stopwatch:
    """Seconds spent, by name; several threads add to it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Adds the time of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                spent = time.perf_counter() - started
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def take(self) -> dict[str, float]:
        """Return the seconds that were added since the last call, by name."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds


class TimedTeacher:
    """A teacher whose own time is measured: what is left of a scoring is the sampling.

    On a GPU the teacher runs on after it returned, and the next to wait for it bears the time.
    """

    def __init__(self, engine: TeacherEngine, watch: Stopwatch) -> None:
        self.vocab_size = engine.vocab_size
        self.device = engine.device
        self.replica: Replica = engine.replica
        self._engine = engine
        self._watch = watch

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the teacher inside."""
        return self._engine.identity

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        """Yield the teacher's chunks; the seconds that they take are the teacher's."""
        chunks = iter(self._engine.chunks(tokens))
        while True:
            with self._watch.running("teacher"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


class Progress(NamedTuple):
    """Positions of the whole capture that are on disk, of all there will be."""

    done: int
    total: int


def progress_on_disk(folder: Path, plan: CachePlan, bytes_per_position: float) -> Progress:
    """Measure the progress of a capture by all its replicas.

    Args:
        folder: of a cache; of several that are written together, one.
        plan: of the cache.
        bytes_per_position: of unfinished shards; those that replicas write at this moment are estimated by their size.
    """
    names, unfinished = [], 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                names.append(entry.name)
            elif entry.name.endswith(".dpt.part"):
                with suppress(OSError):  # it may have been finished meanwhile
                    unfinished += entry.stat().st_size
    finished = sum(plan.shard_range(shard)[1] for shard in shards_in(plan, names))
    total = plan.num_sequences * plan.seq_len
    done = finished * plan.seq_len + int(unfinished / max(bytes_per_position, 1e-9))
    return Progress(min(done, total), total)


class Written(NamedTuple):
    """A batch that was written: what telemetry counts of it.

    Attributes:
        shard: number.
        first: its first sequence.
        sequences: in the batch.
        positions: written.
        measured: positions that `hits` counts.
        hits: positions whose next token is among the stored ids.
        entropy: mean, nats.
        size: bytes written.
    """

    shard: int
    first: int
    sequences: int
    positions: int
    measured: int
    hits: float
    entropy: float
    size: int


class CaptureLog:
    """Counts what one replica does and writes a line every few seconds; its leader has one.

    Attributes:
        eta_s: seconds until the whole capture is done, at the pace of all its replicas; None while it is unknown.
        last: the line written last.

    Args:
        path: of the JSONL file; None writes none.
        replica: number of this replica in its job.
        folder: of a cache that it writes, for the progress of all.
        plan: of that cache.
        watch: seconds by stage, filled by those who do the work; what "scoring" has beyond "teacher" is sampling.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        replica: int,
        folder: Path,
        plan: CachePlan,
        watch: Stopwatch,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.eta_s: float | None = None
        self.last: dict[str, Any] | None = None
        self._path = path
        self._replica = replica
        self._folder = folder
        self._plan = plan
        self._watch = watch
        self._interval_s = interval_s
        self._written = self._started = time.monotonic()
        self._looks: deque[tuple[float, int]] = deque()
        self._look_cost_s = 0.0
        self._positions = self._bytes = 0
        self._since = _Sums()
        self._queue_depth = 0
        self._look()

    def add(self, written: Written, queue_depth: int) -> None:
        """Count a batch; write a line if it is time to.

        Args:
            written: the batch.
            queue_depth: batches that wait to be written, this one included.
        """
        self._since.add(written)
        self._positions += written.positions
        self._bytes += written.size
        self._queue_depth = queue_depth
        if time.monotonic() - self._written >= self._interval_s:
            self.write()

    def write(self) -> None:
        """Write a line on what was counted since the last one."""
        now = time.monotonic()
        if not self._since.batches:
            return
        if now - (self._looks[-1][0] if self._looks else 0) >= LEAST_COST * self._look_cost_s:
            self._look()
        seconds = now - self._written
        spent = self._watch.take()
        spent["sampling"] = max(0.0, spent.pop("scoring", 0.0) - spent.get("teacher", 0.0))
        record = {
            "time": round(time.time(), 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "replica": self._replica,
            **self._since.described(),
            "seconds": round(seconds, 3),
            "positions_per_s": round(self._since.positions / max(seconds, 1e-9), 1),
            "seconds_in": {name: round(value, 3) for name, value in sorted(spent.items())},
            "queue_depth": self._queue_depth,
            "total_positions": self._positions,
            "capture_done": self._looks[-1][1] if self._looks else None,
            "capture_positions": self._plan.num_sequences * self._plan.seq_len,
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
        }
        self._since, self._written = _Sums(), now
        self.last = record
        self._append(json.dumps(record) + "\n")

    def _append(self, line: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.warning(f"no telemetry: {error}; the capture goes on", extra=ANY_RANK)
            self._path = None

    def _look(self) -> None:
        """Measure the progress of all replicas, and when they will be done at this pace."""
        started = time.monotonic()
        per_position = self._bytes / self._positions if self._positions else float("inf")
        done, total = progress_on_disk(self._folder, self._plan, per_position)
        now = time.monotonic()
        self._look_cost_s = now - started
        self._looks.append((now, done))
        while now - self._looks[0][0] > RATE_OVER_S and len(self._looks) > 2:
            self._looks.popleft()
        then, before = self._looks[0]
        gained = done - before
        self.eta_s = (total - done) * (now - then) / gained if gained > 0 else None


class _Sums:
    """Sums over the batches since the last line of the log."""

    def __init__(self) -> None:
        self.batches = self.sequences = self.positions = self.measured = self.size = 0
        self.hits = self.entropy = 0.0
        self.shard = self.first = self.last = 0

    def add(self, written: Written) -> None:
        if not self.batches:
            self.first = written.first
        self.shard, self.last = written.shard, written.first + written.sequences - 1
        self.batches += 1
        self.sequences += written.sequences
        self.positions += written.positions
        self.measured += written.measured
        self.hits += written.hits
        self.entropy += written.entropy * written.sequences
        self.size += written.size

    def described(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "sequences": [self.first, self.last],
            "num_sequences": self.sequences,
            "positions": self.positions,
            "bytes": self.size,
            "entropy": round(self.entropy / self.sequences, 4) if self.sequences else None,
            "hit_rate": round(self.hits / self.measured, 4) if self.measured else None,
        }


def telemetry_path(cache: Path) -> Path:
    """Return the file of this process in a cache's folder."""
    name = f"{socket.gethostname()}-{os.getpid()}-{time.strftime('%Y%m%dT%H%M%S')}.jsonl"
    return cache / FOLDER / name
