"""Recipe section `plan`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from distill_pretrain.config import Section


class PlanConfig(Section):
    """The machines, the speeds and the pilot that the figures of `plan` start from."""

    gpus: int | None = Field(default=None, ge=1, le=1 << 20)
    """Processes of the student's job, one per GPU; null takes the launcher's."""
    gpus_per_node: int = Field(default=8, ge=1, le=1 << 20)
    """GPUs of a node."""
    gpu_memory_gb: float = Field(default=80.0, gt=0, le=1e9)
    """Memory of a GPU, in units of 1e9 bytes."""
    gpu_reserve_gb: float = Field(default=6.0, ge=0, le=1e9)
    """The part of it that CUDA, NCCL and fragmentation take (an assumption; measure it on your machines)."""
    process_base_gb: float = Field(default=0.395, ge=0, le=1e9)
    """Host memory of a process of `train` without a model or CUDA, in units of 1e9 bytes (docs/results/memory)."""
    gpu_tflops: float = Field(default=989.0, ge=1e-6, le=1e9)
    """Dense bf16 peak of a GPU, in 1e12 operations per second (an H100's by default)."""
    utilization: float = Field(default=0.35, ge=1e-6, le=1)
    """Share of gpu_tflops that a model reaches where no speed is stated (an assumption)."""
    pilot: Path | None = None
    """A finished small cache of the same kind of targets, or the JSON of `inspect --estimators --output`."""
    ce_run: Path | None = None
    """Run folder of a short student without a cache; with kd_run it measures what distillation adds to a step."""
    kd_run: Path | None = None
    """Run folder of the same student on the same layout, trained from a cache."""
    teacher_tokens_per_second: float | None = Field(default=None, ge=1e-6, le=1e15)
    """Positions per second of one teacher replica, as `capture` prints them; null estimates it."""
    teacher_parameters: float | None = Field(default=None, ge=1, le=1e18)
    """Parameters of the teacher, such as 8.0e+9, for that estimate; null reads a config.json in teacher.path."""
    student_tokens_per_second: float | None = Field(default=None, ge=1e-6, le=1e15)
    """Training speed of the student's whole job; null estimates it."""
    loader_tokens_per_second: float = Field(default=720000.0, ge=1e-6, le=1e15)
    """Positions per second that one loader thread reads, checks and pads (docs/results/cache, one 2.5 GHz core)."""
    students: int = Field(default=1, ge=1, le=1 << 40)
    """Students that will learn from the cache."""
    storage_months: float = Field(default=1.0, ge=0, le=1e9)
    """How long the cache is kept."""
    storage_gpu_hours_per_tb_month: float = Field(default=10.0, ge=0, le=1e9)
    """Price of 1e12 stored bytes for a month over that of a GPU-hour (an assumption: 20 over 2)."""
