"""metrics.jsonl: one record per optimizer step, exact over kills and resumes; events.jsonl: what else happened.

Fields of a step's record (null where unknown; "most" is over the ranks of the job):

    step, tokens          steps done, and tokens seen by then
    loss, ce, kl, ...     terms of the objective, nats per token; `loss` is what is minimised
    load_balancing_loss, router_z_loss   of a model with experts, not in `loss`: means over layers and sequences, 1 in
                          balance; gradients have their sum over layers, times model.experts.load_balancing and z_loss
    grad_norm, lr         before clipping; of this step
    ce_weight, kd_weight, temperature, smoothing   of this step; each only where it changes with the step
    applied               whether the update was made
    tokens_per_second     of the whole job
    tflops_per_device     1e12 model FLOPs per second and process (mcore/model/flops.py)
    mfu                   of it, the share of the device's peak (train.peak_tflops), 0 to 1
    seconds, data_wait    of the step; of it, what the rank that waited most waited for its batch
    cache_mb_per_s        1e6 bytes of cache per second, read by the rank that read most
    rss_peak_gb           1e9 bytes, most resident host memory of a process since it started
    gpu_peak_gb           1e9 bytes, most memory of tensors on a GPU since the process started
    time                  seconds since 1970 when the step was done
    held_out_ce, held_out_kl   at steps of train.eval_interval: nats, means over the valid tokens of held-out text
    held_out_ce_ema, held_out_kl_ema   the same of the averaged weights (optimizer.ema_decay)

Events: `started` (num_processes), `phase` (path of the phase before, optimizer, first_sequence), `repeating` (steps
done before and lost), `bad_step` (reason, verdict), `rolled_back`, `saved` (seconds for which training
waited; under train.async_save also published_after, seconds since it began), `stopped` and `finished`, each with step
and time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.files.disk import naming
from distill_pretrain.train.callbacks import Callback


class MetricsDamaged(DistillPretrainError):
    """metrics.jsonl of a run cannot be continued; names the line."""


class MetricsLog:
    """Appends records; only rank 0 owns one. A `with` block closes it.

    Args:
        path: the JSONL file.
        resume_step: steps already done; what follows their records is dropped, half-written lines too.

    Attributes:
        dropped: records that were.

    Raises:
        MetricsDamaged: a line among the records that are kept is none.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        before = path.read_bytes() if path.exists() else b""
        kept, self.dropped = _split(path, before, resume_step)
        after = b"".join(line + b"\n" for line, _ in kept)
        if after != before or not path.exists():
            publish_bytes(path, after)
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Make the records so far durable: no checkpoint may outlive the records of its steps."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _split(
    path: Path, data: bytes, resume_step: int
) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """The lines and records of steps up to one, and the number of later records."""
    lines = [(line, _record(line)) for line in data.splitlines()]
    kept = [n for n, (_, record) in enumerate(lines) if record and record["step"] <= resume_step]
    end = kept[-1] + 1 if kept else 0
    found = []
    for number, (line, record) in enumerate(lines[:end], 1):
        if record is None:
            raise MetricsDamaged(
                "a line of the log of the run is no record",
                where=f"{path}:{number}",
                found=line[:60].decode(errors="replace"),
                expected="one JSON object per optimizer step",
                remedy="repair or remove that line, and start again",
            )
        found.append((line, record))
    return found, sum(record is not None for _, record in lines[end:])


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int else None
    except (ValueError, TypeError, KeyError):
        return None


class EventLog:
    """Appends to events.jsonl what a run went through, over all its starts; nothing is ever cut off.

    Args:
        path: the JSONL file; None on ranks that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, event: str, step: int, **facts: Any) -> None:
        """Append one event, such as "saved" with its seconds."""
        if self._path is None:
            return
        record = {"event": event, "step": step, "time": round(time.time(), 3), **facts}
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Metrics(Callback):
    """Keeps metrics.jsonl of a training.

    Args:
        path: the file; None on ranks that do not write.
        events: told of steps that are done again.
    """

    def __init__(self, path: Path | None, events: EventLog) -> None:
        self._path = path
        self._events = events
        self._log: MetricsLog | None = None

    def begin(self, step: int) -> None:
        """See `Callback`."""
        if self._path is None:
            return
        self._log = MetricsLog(self._path, resume_step=step)
        if self._log.dropped:
            self._events.add("repeating", step, steps=self._log.dropped)

    def end_step(self, step: int, record: Mapping[str, Any], doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        if self._log is not None:
            self._log.write(record)

    def before_save(self, step: int) -> None:
        """See `Callback`."""
        if self._log is not None:
            self._log.sync()

    def settle(self, doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        self.end()

    def end(self) -> None:
        """See `Callback`."""
        if self._log is not None:
            self._log.close()
            self._log = None
