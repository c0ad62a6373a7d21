"""Figures of a call, a line of JSON each, on disk as soon as they are known."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from reporting import append_line

NO_GPU = 77
"""Exit status of what came as far as its first CUDA call on a machine without a GPU."""


def record(figure: str, **values: Any) -> None:
    """Print a figure, and append it to $GPU_DAY_FIGURES with the stage that found it."""
    line = {"stage": os.environ.get("GPU_DAY_STAGE", "none"), "figure": figure, **values}
    print(json.dumps(line), flush=True)
    path = os.environ.get("GPU_DAY_FIGURES")
    append_line(Path(path) if path else None, line)


def is_tiny() -> bool:
    """Whether the sizes are those of a rehearsal."""
    return os.environ.get("GPU_DAY_SIZE", "full") == "tiny"


def end_without_gpu() -> None:
    """The first CUDA call is next: ends the stage where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use: the stage ends before its first CUDA call", flush=True)
        sys.exit(NO_GPU)
