"""Recipe sections `eval` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from distill_pretrain.config import Section


class EvalConfig(Section):
    """Held-out figures of trained models."""

    models: dict[str, Path] = Field(min_length=1)
    """Name to run folder (or checkpoint folder) of every model to score."""
    output: Path
    """JSON file that receives the figures."""
    num_sequences: int | None = Field(default=None, ge=1)
    """Score only the first so many held-out sequences; null scores all."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the models' forward pass; the teacher has its own in `teacher.dtype`."""


class ReportConfig(Section):
    """A markdown report that compares runs."""

    runs: dict[str, Path] = Field(min_length=1)
    """Name to run folder of every training run in the loss-curve picture."""
    eval: Path
    """JSON file written by `eval`."""
    output_dir: Path
    """Folder that receives report.md and its pictures."""
    title: str = "Distillation report"
    """Heading of the report."""
