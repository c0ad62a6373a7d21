"""Recipe section `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from distill_pretrain.config import Section


class TrainConfig(Section):
    """Length, batch, precision, logging and checkpoints of a training run."""

    output_dir: Path
    """Run folder: recipe.yaml, metrics.jsonl, checkpoints/."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; the loss is always taken in fp32, bf16 keeps fp32 master weights."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the initial weights, the dropout and the order in which sequences are visited."""
    log_interval: int = Field(default=10, ge=1)
    """Steps between console lines (metrics.jsonl has every step)."""
    checkpoint_interval: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    threads: int = Field(default=0, ge=0)
    """CPU threads per process; 0 divides the cores among the processes of a node."""
