"""Figures of the jobs and tests that ran, also of those that were stopped: from their own files and from the log."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from figures import record

WARMUP_STEPS = 5
OUTCOME = re.compile(r"(?P<file>tests/\S+\.py)::.* (?P<outcome>PASSED|FAILED|SKIPPED|ERROR)\b")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON; none where there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last one of a job that was killed
    return found


def training(run: Path) -> None:
    """Speed, memory and losses of a run."""
    records = lines_of(run / "metrics.jsonl")
    if not records:
        return
    steady = records[WARMUP_STEPS:] or records

    def median(key: str) -> float | None:
        values = [line[key] for line in steady if line.get(key) is not None]
        return round(statistics.median(values), 4) if values else None

    record(
        "training",
        run=run.name,
        steps=len(records),
        first_step_s=records[0]["seconds"],
        seconds=median("seconds"),
        tokens_per_second=median("tokens_per_second"),
        tflops_per_device=median("tflops_per_device"),
        mfu=median("mfu"),
        data_wait_s=median("data_wait"),
        gpu_peak_gb=records[-1].get("gpu_peak_gb"),
        first_loss=records[0]["loss"],
        last_loss=records[-1]["loss"],
        not_applied=sum(not line["applied"] for line in records),
    )


def capture(cache: Path) -> None:
    """The last figures of every process that wrote to a cache."""
    for path in sorted((cache / ".telemetry").glob("*.jsonl")):
        lines = lines_of(path)
        if lines:
            figures = {
                key: value for key, value in lines[-1].items() if not isinstance(value, dict)
            }
            is_finished = (cache / "manifest.json").is_file()
            record("capture", cache=cache.name, finished=is_finished, **figures)


def tests(log: Path) -> None:
    """How the tests of each file ended, of a file that was not gone through too."""
    counts: dict[str, Counter[str]] = {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        if found := OUTCOME.match(line):
            counts.setdefault(found["file"], Counter())[found["outcome"].lower()] += 1
    for file, outcomes in counts.items():
        record("test", file=file, **outcomes)


def main() -> None:
    work = Path(os.environ["WORK"])
    os.environ["GPU_DAY_STAGE"] = "collect"
    for metrics in sorted(work.glob("**/metrics.jsonl")):
        training(metrics.parent)
    for telemetry in sorted(work.glob("**/.telemetry")):
        capture(telemetry.parent)
    tests(Path(os.environ["GPU_DAY_LOG"]))


if __name__ == "__main__":
    main()
