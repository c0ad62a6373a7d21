"""Recipe section `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill_pretrain.config import Section, nameable


class BadStepsConfig(Section):
    """What becomes of a step whose loss or gradient is not finite, or whose loss jumps.

    `skip`: the batch is passed over and the weights stay; `rollback`: training goes back to the newest checkpoint and
    on with the batches after the bad one; `stop`: the job ends, its checkpoints kept.
    """

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """For a loss or gradient norm that is NaN or infinite."""
    spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """For a loss above the rolling mean by `spike_deviations` standard deviations."""
    spike_deviations: float = Field(default=8.0, gt=0)
    """How far a loss must jump to be a spike."""
    window: int = Field(default=64, ge=2, le=1 << 20)
    """Applied steps in the rolling statistics; no step is a spike before they are full."""
    most_in_a_row: int = Field(default=10, ge=0, le=1 << 38)
    """Bad steps in a row that are put up with; one more stops the job."""
    most_rollbacks: int = Field(default=3, ge=0, le=1 << 38)
    """Rollbacks of one job that are put up with."""


class TrainConfig(Section):
    """Length, batch, precision, logging and checkpoints of a training run."""

    output_dir: Path
    """Run folder: recipe.yaml, metrics.jsonl, checkpoints/."""
    steps: int = Field(ge=1, le=1 << 38)
    """Optimizer steps."""
    start_from: str | None = None
    """Initial weights: a Hugging Face folder, a run or a checkpoint, or `teacher`, the weights at teacher.path; null
    draws them. Optimizer, schedule and data start anew. A run that has started does not read them again."""
    continue_from: str | None = None
    """A run or checkpoint whose next phase this run is: weights and the optimizer's state go on, the schedule begins,
    data go on behind what was seen if corpora, seq_len and seeds are the same, or begin. Everything else may change."""
    fresh_optimizer: bool = False
    """Take the weights of continue_from alone."""
    micro_batch_size: int = Field(default=1, ge=1, le=1 << 20)
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int = Field(ge=1, le=1 << 24)
    """Sequences per optimizer step, over all ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; the loss is always taken in fp32, bf16 keeps fp32 master weights."""
    seed: int = Field(default=1234, ge=0, lt=1 << 63)
    """Seed of the initial weights, the dropout and the order in which sequences are visited."""
    log_interval: int = Field(default=10, ge=1, le=1 << 38)
    """Steps between console lines (metrics.jsonl has every step)."""
    checkpoint_interval: int = Field(default=500, ge=1, le=1 << 38)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1 << 38)
    """Newest checkpoints kept."""
    async_save: bool = False
    """Write checkpoints from a copy in host memory while training goes on; they are published when complete."""
    export_interval: int | None = Field(default=None, ge=1, le=1 << 38)
    """Steps between exports to output_dir/hf/step-N for transformers, the last step's included; null means none."""
    keep_exports: int | None = Field(default=None, ge=1)
    """Newest exports kept in output_dir/hf; null keeps all."""
    track: tuple[Literal["tensorboard", "wandb", "prometheus"], ...] = ()
    """Where the records of metrics.jsonl go besides: output_dir/tensorboard, W&B, output_dir/metrics.prom."""
    eval_interval: int | None = Field(default=None, ge=1, le=1 << 38)
    """Steps between evaluations on data.held_out_tokens, the last step's included; null means none. Its figures,
    `held_out_ce` and, with data.held_out_cache, `held_out_kl`, go into metrics.jsonl and wherever that goes."""
    eval_sequences: int = Field(default=256, ge=1, le=1 << 38)
    """Held-out sequences of an evaluation: the first ones, in whole global batches, at least one and no more than
    there are."""
    profile: tuple[int, int] | None = None
    """First and last step that torch.profiler watches on every rank: a trace per rank in output_dir/profile, for
    Perfetto or chrome://tracing, and a table of what took longest; null means none."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of a device in 1e12 operations per second, for `mfu`; null knows common GPUs in bf16."""
    bad_steps: BadStepsConfig = Field(default_factory=BadStepsConfig)
    """What becomes of a step with NaN, infinity or a jump of the loss."""
    stuck_after_s: float | None = Field(default=1800.0, gt=0)
    """Seconds without progress of any rank (a step; a tensor or file read, written, hashed or exported) after which a
    job of several processes names the ranks it waits for and ends with exit code 75, for the launcher to start it
    again; null waits for the collective's own timeout."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads per process; 0 divides the cores among the processes of a node."""

    _start_can_be_named = field_validator("start_from", "continue_from")(nameable)

    @model_validator(mode="after")
    def _has_one_start(self) -> TrainConfig:
        if self.start_from is not None and self.continue_from is not None:
            raise ValueError("start_from and continue_from: a run has one of the two")
        if self.fresh_optimizer and self.continue_from is None:
            raise ValueError("fresh_optimizer: only with continue_from; else it is fresh anyhow")
        return self

    @field_validator("profile")
    @classmethod
    def _is_a_range(
        cls, steps: tuple[int, int] | None, info: ValidationInfo
    ) -> tuple[int, int] | None:
        if steps is not None:
            last = info.data.get("steps", steps[1])
            if not 1 <= steps[0] <= steps[1] <= last:
                raise ValueError(
                    f"two steps in ascending order, from 1 to {last}, the last of train.steps"
                )
        return steps
