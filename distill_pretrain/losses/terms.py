"""What the objectives share: weights at a step, reported terms, this rank's columns.

Shapes: B sequences, L positions, T = L * B tokens, V real vocabulary, V_pad padded vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from distill_pretrain.contracts import TokenBatch
from distill_pretrain.errors import ConfigError
from distill_pretrain.losses.points import Points, value_at

TERMS = ("loss", "ce", "kl")
"""Reported always: the loss as weighted, the unweighted cross-entropy and divergence."""

TokenWeighting = Literal["none", "teacher_confidence"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The settings of one step that both objectives have; see `ObjectiveConfig`.

    Raises:
        ConfigError: a setting is none.
    """

    ce_weight: float
    kd_weight: float
    temperature: float = 1.0
    temperature_squared: bool = True
    smoothing: float = 0.0
    z_loss: float = 0.0
    token_weighting: TokenWeighting = "none"

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kd_weight", "z_loss"):
            self._require(name, "at least 0", getattr(self, name) >= 0)
        self._require("temperature", "more than 0", self.temperature > 0)
        self._require("smoothing", "at least 0 and less than 1", 0 <= self.smoothing < 1)
        kinds = get_args(TokenWeighting)
        self._require("token_weighting", " or ".join(kinds), self.token_weighting in kinds)

    def _require(self, name: str, expected: str, holds: bool) -> None:
        value = getattr(self, name)
        if not holds or value == math.inf:
            raise ConfigError(
                "the loss has no such setting", where=name, found=value, expected=expected
            )

    @property
    def kd_scale(self) -> float:
        """What multiplies every token's divergence: kd_weight, times tau^2 where asked for."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """`Weights` of every step."""

    ce_weight: Points
    kd_weight: Points
    temperature: Points = 1.0
    temperature_squared: bool = True
    smoothing: Points = 0.0
    z_loss: float = 0.0
    token_weighting: TokenWeighting = "none"

    def at(self, step: int) -> Weights:
        """The weights of optimizer step `step`; 1 is the first."""
        return Weights(
            ce_weight=value_at(self.ce_weight, step),
            kd_weight=value_at(self.kd_weight, step),
            temperature=value_at(self.temperature, step),
            temperature_squared=self.temperature_squared,
            smoothing=value_at(self.smoothing, step),
            z_loss=self.z_loss,
            token_weighting=self.token_weighting,
        )


def column_slice(
    logits: torch.Tensor, vocab_size: int, tensor_group: dist.ProcessGroup | None
) -> slice:
    """Global ids of this rank's real columns; an empty slice where it holds padding alone."""
    rank = dist.get_rank(tensor_group) if tensor_group is not None else 0
    first = rank * logits.size(-1)
    return slice(first, max(first, min(first + logits.size(-1), vocab_size)))


def sequence_first(x: torch.Tensor) -> torch.Tensor:
    """[B, L, ...] -> [T, ...] in the order of megatron-core's logits [L, B, V/tp]."""
    return x.transpose(0, 1).flatten(0, 1)


class Objective:
    """What the model's last stage computes from its logits [L, B, V_pad / tp] and a batch [B, L].

    Calling it gives the sums over the micro-batch's tokens of the terms that `term_names` lists, fp32; the first is
    differentiable, the others are reported.

    Args:
        vocab_size: V.
        tensor_group: ranks that hold the other columns; None when this rank holds them all.
        weights: fields of `WeightSchedule`.
    """

    TERMS = TERMS
    takes_hidden = False
    """Whether `from_hidden` is to be called, without logits."""

    def __init__(
        self, *, vocab_size: int, tensor_group: dist.ProcessGroup | None, **weights: Any
    ) -> None:
        self.schedule = WeightSchedule(**weights)
        self.vocab_size = vocab_size
        self.tensor_group = tensor_group
        self.begin_step(1)

    def begin_step(self, step: int) -> None:
        """Take the weights of optimizer step `step`, counted from 1 over the whole run, resumed or not."""
        self.weights = self.schedule.at(step)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms; `z`, (log sum exp z)^2 where there is a label, is one if it is trained."""
        return (*TERMS, "z") if self.schedule.z_loss else TERMS

    def __call__(self, logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Sums of the terms over the tokens of one micro-batch."""
        raise NotImplementedError

    def summed(self, loss: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """The sums from the loss, fp32[T] or already summed, and all other terms fp32[3, T]."""
        wanted = terms[: len(self.term_names) - 1]
        return torch.cat((loss.sum().reshape(1), wanted.sum(dim=1)))
