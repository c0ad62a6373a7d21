"""How long each stage of a comparison took, and on what: one JSON object per line, appended when a stage ends."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distill_pretrain.reports.report import installed_versions, today

FILE = "stages.jsonl"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finished piece of work.

    Attributes:
        name: such as "train ce, seed 1".
        seconds: from its start, or its last resumption, to its end.
        date: of its end, ISO 8601.
        processes: that worked on it.
        hardware: of the first process's machine.
        software: package -> version.
    """

    name: str
    seconds: float
    date: str
    processes: int
    hardware: str
    software: dict[str, str]

    @classmethod
    def now(cls, name: str, seconds: float, *, processes: int) -> Stage:
        """Make a stage that ends here and now."""
        return cls(
            name=name,
            seconds=round(seconds, 2),
            date=today(),
            processes=processes,
            hardware=hardware(),
            software=installed_versions(),
        )

    def append_to(self, folder: Path) -> None:
        """Add it to FOLDER/stages.jsonl; one write, so that jobs side by side do not mix their lines."""
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(self), sort_keys=True) + "\n"
        descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_stages(folder: Path) -> list[Stage]:
    """Read the stages in the order they ended; a line cut off by a full disk is left out."""
    path = folder / FILE
    stages = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            stages.append(Stage(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return stages


def hardware() -> str:
    """Describe this machine in words: processor and cores, and its GPUs if it has any."""
    parts = [f"{_processor()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
