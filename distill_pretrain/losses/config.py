"""Recipe section `objective`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section
from distill_pretrain.kernels.sparse_kd.settings import LossSettings, Residual, TokenWeighting
from distill_pretrain.losses.schedule import Schedule, Scheduled, WithDecay, extremes, value_at

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

MOST_WEIGHT = 1e9
"""Of a term of the loss: squares of gradients must stay within fp32."""
SCHEDULED = ("ce_weight", "kd_weight", "temperature", "smoothing")
"""The keys of ObjectiveConfig that may change with the step."""
CHUNK_TOKENS = 4096
"""Of a chunked head: enough for the products to run at full speed."""


class ObjectiveConfig(Section):
    """What the student minimises per token: ce_weight * CE(label) + kd_weight * divergence(teacher, student).

    Where a key takes [step, value] points, the value is linear between them and constant outside; steps count from 1.
    {stable: A, decayed: B} is A until the learning rate's decay begins, and then goes to B as the rate goes to min_lr.
    """

    ce_weight: Scheduled = 1.0
    """Weight of the cross-entropy with the true next token: a number, points, or {stable, decayed}."""
    kd_weight: Scheduled = 0.0
    """Weight of the distillation term; needs data.cache, or target: teacher. As ce_weight."""
    target: Literal["cache", "teacher"] = "cache"
    """`cache`: sparse targets of data.cache; `teacher`: section `teacher` runs in the job, over all ids (FullKD)."""
    divergence: Divergence = "forward_kl"
    """KL(teacher || student), KL(student || teacher) or Jensen-Shannon; the last two only with target: teacher."""
    temperature: Scheduled = 1.0
    """tau of softmax(z / tau); cached t^(1/tau) keeps its mass (biased for sampled t). As ce_weight."""
    temperature_squared: bool = True
    """Multiply the distillation term by tau^2, so that its gradient keeps its size (Hinton et al. 2015)."""
    residual: Residual = "drop"
    """Where a cached target's missing mass goes: nowhere, kept ids, true token, bucket of other ids, all ids evenly."""
    smoothing: Scheduled = 0.0
    """a in [0, 1): targets become (1 - a) t + a / vocabulary size. As ce_weight."""
    z_loss: float = Field(default=0.0, ge=0, le=MOST_WEIGHT)
    """Weight of (log sum exp z)^2 at every position with a label; reported as `z`."""
    token_weighting: TokenWeighting = "none"
    """`teacher_confidence`: a token's distillation term is multiplied by its target's largest probability."""

    kernel: Literal["auto", "reference", "cuda"] = "auto"
    """`auto`: CUDA kernels where they run; `reference`: plain PyTorch; `cuda`: kernels or an error. The same loss."""
    head: Literal["auto", "chunked", "full"] = "auto"
    """`chunked`: LM head and loss by 4096 tokens, less memory; `full`: logits of all; `auto`: chunked on a GPU."""

    def at(self, step: int, decay_left: float = 1.0) -> LossSettings:
        """Return the loss of an optimizer step.

        Args:
            step: 1 is the first.
            decay_left: of the learning rate; see `value_at`.
        """
        scheduled = {name: value_at(getattr(self, name), step, decay_left) for name in SCHEDULED}
        return LossSettings(
            **scheduled,
            temperature_squared=self.temperature_squared,
            residual=self.residual,
            z_loss=self.z_loss,
            token_weighting=self.token_weighting,
        )

    @property
    def moving(self) -> tuple[str, ...]:
        """The keys whose value changes with the step."""
        return tuple(name for name in SCHEDULED if not isinstance(getattr(self, name), float))

    @property
    def with_decay(self) -> tuple[str, ...]:
        """The keys whose value goes with the decay of the learning rate."""
        return tuple(name for name in SCHEDULED if isinstance(getattr(self, name), WithDecay))

    @property
    def peak_kd_weight(self) -> float:
        """The largest kd_weight of any step; 0 means that no targets are needed."""
        return extremes(self.kd_weight)[1]

    def chunk_tokens(self, *, on_gpu: bool) -> int | None:
        """Return the number of tokens whose logits are made at a time; None for those of a whole micro-batch."""
        chosen = (
            on_gpu and self.target == "cache" if self.head == "auto" else self.head == "chunked"
        )
        return CHUNK_TOKENS if chosen else None

    @field_validator("ce_weight", "kd_weight")
    @classmethod
    def _a_weight(cls, schedule: Schedule) -> Schedule:
        return _within(
            schedule,
            f"at least 0, at most {MOST_WEIGHT:g}",
            lambda value: 0 <= value <= MOST_WEIGHT,
        )

    @field_validator("temperature")
    @classmethod
    def _a_temperature(cls, schedule: Schedule) -> Schedule:
        return _within(
            schedule, "more than 0, from 1e-06 to 1e+06", lambda value: 1e-6 <= value <= 1e6
        )

    @field_validator("smoothing")
    @classmethod
    def _a_share(cls, schedule: Schedule) -> Schedule:
        return _within(schedule, "at least 0 and less than 1", lambda value: 0 <= value < 1)

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if extremes(self.ce_weight)[1] == 0 and self.peak_kd_weight == 0:
            raise ValueError("ce_weight and kd_weight are both 0: there is nothing to learn")
        if self.target == "teacher":
            self._check_for_teacher()
        elif self.divergence != "forward_kl":
            raise ValueError(
                f"divergence: {self.divergence} needs target: teacher; a cache has no probabilities outside the "
                "kept ids, and a sample gives no unbiased estimate of this divergence"
            )
        return self

    def _check_for_teacher(self) -> None:
        if self.peak_kd_weight == 0:
            raise ValueError("target: teacher with kd_weight: 0 would run a teacher in vain")
        if self.head == "chunked":
            raise ValueError(
                "head: chunked is for cached targets; target: teacher compares all logits: head: full"
            )
        if self.kernel == "cuda":
            raise ValueError(
                "kernel: cuda is for cached targets; target: teacher runs in plain PyTorch on any device"
            )
        if self.residual != "drop":
            raise ValueError(
                f"residual: {self.residual} is for cached targets; with target: teacher no mass is missing"
            )


def _within(schedule: Schedule, expected: str, holds: Callable[[float], bool]) -> Schedule:
    if not all(map(holds, extremes(schedule))):
        raise ValueError(f"found: {schedule}; expected: {expected}")
    return schedule
