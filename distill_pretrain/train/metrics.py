"""metrics.jsonl: one record per optimizer step, exact over kills and resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distill_pretrain.formats.atomic import publish_bytes


class MetricsLog:
    """Appends records; only rank 0 owns one. A `with` block closes it.

    Args:
        path: the JSONL file.
        resume_step: steps already done; later records, and a half-written last line, are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
        publish_bytes(path, "".join(kept).encode())
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Make the records so far durable: no checkpoint may outlive the records of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
