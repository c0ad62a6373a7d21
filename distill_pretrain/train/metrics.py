"""metrics.jsonl: one record per optimizer step, exact over kills and resumes; events.jsonl: what else happened.

Fields of a step's record (null where unknown; "most" is over the ranks of the job):

    step, tokens          steps done, and tokens seen by then
    loss, ce, kl, ...     terms of the objective, nats per token; `loss` is what is minimised
    grad_norm, lr         before clipping; of this step
    applied               whether the update was made
    tokens_per_second     of the whole job
    tflops_per_device     1e12 model FLOPs per second and process (mcore/flops.py)
    mfu                   of it, the share of the device's peak (train.peak_tflops), 0 to 1
    seconds, data_wait    of the step; of it, what the rank that waited most waited for its batch
    cache_mb_per_s        1e6 bytes of cache per second, read by the rank that read most
    rss_peak_gb           1e9 bytes, most resident host memory of a process since it started
    gpu_peak_gb           1e9 bytes, most memory of tensors on a GPU since the process started
    time                  seconds since 1970 when the step was done

Events: `started` (num_processes), `repeating` (steps done before and lost), `bad_step` (reason, verdict),
`rolled_back`, `saved` (seconds for which training waited; under train.async_save also published_after, seconds since
it began), `stopped` and `finished`, each with step and time.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from distill_pretrain.formats.atomic import publish_bytes
from distill_pretrain.train.trackers import Trackers


class MetricsLog:
    """Appends records; only rank 0 owns one. A `with` block closes it.

    Args:
        path: the JSONL file.
        resume_step: steps already done; later records, and a half-written last line, are dropped.
        trackers: get the same records; closed with the log.

    Attributes:
        dropped: records that were.
    """

    def __init__(self, path: Path, *, resume_step: int, trackers: Trackers | None = None) -> None:
        self._trackers = trackers
        self.dropped = 0
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
                else:
                    self.dropped += 1
        publish_bytes(path, "".join(kept).encode())
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        if self._trackers is not None:
            self._trackers.write(record)

    def sync(self) -> None:
        """Make the records so far durable: no checkpoint may outlive the records of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


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
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
