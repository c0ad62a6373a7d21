"""The settings of the loss, the one record of them from the recipe to the kernels, and the terms that it reports.

Recipe sections use this module, and every `--help` reads those: it imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict, get_args

from distill_pretrain.errors import ConfigError

Residual = Literal["drop", "renormalise", "label", "ghost", "uniform"]
TokenWeighting = Literal["none", "teacher_confidence"]

TERMS = {"ce": "ce_weight", "kl": "kd_weight", "z": "z_loss"}
"""What a loss reports beside itself, unweighted, in the order of every `terms` tensor; and which setting weighs it.

Cross-entropy, divergence, and (log sum exp z)^2 where there is a label."""

ALWAYS_REPORTED = ("ce", "kl")
"""Terms that a run reports whatever their weight is; the others only where they are trained."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the loss of a position is at one step; the formulas are in README.md beside this file.

    Attributes:
        ce_weight: weight of the cross-entropy with the label.
        kd_weight: weight of the divergence from the teacher.
        temperature: tau of student and targets in the divergence.
        temperature_squared: multiply the divergence by tau^2.
        residual: where the mass that a sparse target lacks goes.
        smoothing: a in [0, 1); targets become (1 - a) t + a / V.
        z_loss: weight of (log sum exp z)^2 where there is a label.
        token_weighting: "teacher_confidence" multiplies a position's divergence by its target's largest probability.

    Raises:
        ConfigError: a setting is none.
    """

    ce_weight: float
    kd_weight: float
    temperature: float = 1.0
    temperature_squared: bool = True
    residual: Residual = "drop"
    smoothing: float = 0.0
    z_loss: float = 0.0
    token_weighting: TokenWeighting = "none"

    def __post_init__(self) -> None:
        for name in TERMS.values():
            self._require(name, "at least 0", getattr(self, name) >= 0)
        self._require("temperature", "more than 0", self.temperature > 0)
        self._require("smoothing", "at least 0 and less than 1", 0 <= self.smoothing < 1)
        residuals, weightings = get_args(Residual), get_args(TokenWeighting)
        self._require("residual", ", ".join(residuals), self.residual in residuals)
        self._require(
            "token_weighting", " or ".join(weightings), self.token_weighting in weightings
        )

    def _require(self, name: str, expected: str, holds: bool) -> None:
        value = getattr(self, name)
        if not holds or value == math.inf:
            raise ConfigError(
                "the loss has no such setting", where=name, found=value, expected=expected
            )

    @property
    def numbers(self) -> list[float]:
        """The settings that are numbers, in the order of the fields, as operations of torch take them."""
        return [getattr(self, name) for name in _NUMBERS]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> LossSettings:
        """Return the settings with these `numbers`.

        The others, which tell how targets are prepared, are the defaults.
        """
        return cls(**dict(zip(_NUMBERS, numbers, strict=True)))  # type: ignore[arg-type]

    @property
    def kd_scale(self) -> float:
        """What multiplies every position's divergence: kd_weight, times tau^2 where asked for."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)


_NUMBERS = tuple(field.name for field in fields(LossSettings) if field.type == "float")


class LossKeywords(TypedDict, total=False):
    """The fields of `LossSettings` as keywords of a function."""

    ce_weight: float
    kd_weight: float
    temperature: float
    temperature_squared: bool
    residual: Residual
    smoothing: float
    z_loss: float
    token_weighting: TokenWeighting
