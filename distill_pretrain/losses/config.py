"""Recipe section `objective`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill_pretrain.config import Section
from distill_pretrain.kernels.sparse_kd.settings import (
    Divergence,
    LossSettings,
    Residual,
    TokenWeighting,
)
from distill_pretrain.losses.schedule import Schedule, Scheduled, WithDecay, extremes, value_at

Positions = Literal["all", "student_entropy", "teacher_entropy"]

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
    """KL(teacher || student), KL(student || teacher) or Jensen-Shannon; the last two need target: teacher, or a
    truncated cache (topk, topp) and residual: ghost, to compare its kept ids and one bucket of all others."""
    temperature: Scheduled = 1.0
    """tau of softmax(z / tau); cached t^(1/tau) keeps its mass (biased for sampled t). As ce_weight."""
    temperature_squared: bool = True
    """Multiply the distillation term by tau^2, so that its gradient keeps its size (Hinton et al. 2015)."""
    residual: Residual = "drop"
    """Where a cached target's missing mass goes: nowhere, kept ids, true token, bucket of other ids, all ids evenly.
    decoupled: a bucket too, but kept ids are compared among themselves, which temperature is for (topk, topp)."""
    tail_weight: float = Field(default=1.0, ge=0, le=MOST_WEIGHT)
    """With residual: decoupled, weight of the term that tells kept ids from all others; 1 at temperature 1 is ghost."""
    smoothing: Scheduled = 0.0
    """a in [0, 1): targets become (1 - a) t + a / vocabulary size. As ce_weight."""
    z_loss: float = Field(default=0.0, ge=0, le=MOST_WEIGHT)
    """Weight of (log sum exp z)^2 at every position with a label; reported as `z`."""
    token_weighting: TokenWeighting = "none"
    """`teacher_confidence`: a token's distillation term is multiplied by its target's largest probability."""

    positions: Positions = "all"
    """Where the teacher is learnt from: everywhere, at the share of a sequence where the student's entropy is largest,
    or where the teacher's is above a threshold. Elsewhere the cross-entropy takes that term's place, with kd_weight."""
    position_share: float = Field(default=0.2, gt=0, le=1)
    """With positions: student_entropy, the share of a sequence's positions."""
    entropy_threshold: float = Field(default=0.5, ge=0)
    """With positions: teacher_entropy, in nats."""

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
            # With the teacher in the job all ids are compared, by `dense_kd`.
            divergence=self.divergence if self.target == "cache" else "forward_kl",
            tail_weight=self.tail_weight,
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
            self._check_for_bucket()
        if self.positions != "all":
            self._check_for_positions()
        if self.tail_weight != 1.0 and self.residual != "decoupled":
            raise ValueError("tail_weight is for residual: decoupled")
        return self

    @property
    def needs_truncated(self) -> bool:
        """Whether sampled targets are out of the question: what is learnt depends on which ids are kept."""
        return self.target == "cache" and (
            self._needs_bucket or self.positions == "teacher_entropy"
        )

    @property
    def _needs_bucket(self) -> bool:
        """Whether kept ids of a cache are compared beside one bucket of all others."""
        is_other = self.residual == "decoupled" or self.divergence != "forward_kl"
        return self.target == "cache" and is_other

    def _check_for_positions(self) -> None:
        if self.peak_kd_weight == 0:
            raise ValueError(
                f"positions: {self.positions} with kd_weight: 0: there is nothing to choose"
            )
        if extremes(self.temperature) != (1.0, 1.0) or extremes(self.smoothing)[1] > 0:
            raise ValueError(
                f"positions: {self.positions} needs temperature 1 and no smoothing: elsewhere the label is the target, "
                "and its cross-entropy has neither"
            )
        if self._needs_bucket:
            raise ValueError(
                f"positions: {self.positions} from a cache is for divergence: forward_kl and another residual than "
                "decoupled: elsewhere the label is the target, and only of that KL is the cross-entropy a case"
            )

    def _check_for_bucket(self) -> None:
        if self.residual != "ghost":
            raise ValueError(
                f"divergence: {self.divergence} needs target: teacher, or residual: ghost and a truncated cache, of "
                "which kept ids and one bucket of all others are compared; a sample gives no unbiased estimate of this "
                "divergence"
            )
        if extremes(self.temperature) != (1.0, 1.0):
            raise ValueError(
                f"divergence: {self.divergence} from a cache has temperature 1: what a bucket of other ids has at "
                "another one is not known"
            )

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
