"""The most memory that this process has held, without asking the GPU to wait."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """Return the most resident host memory of this process since it started, in bytes."""
    # getrusage would count what a parent held before this program was started in its place.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes(device: torch.device) -> int:
    """Return the most bytes of tensors on this process's GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
