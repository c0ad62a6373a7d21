"""The settings of the loss, the one record of them from the recipe to the kernels, and the terms that it reports.

Recipe sections use this module, and every `--help` reads those: it imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict, get_args

from distill_pretrain.errors import ConfigError

Residual = Literal["drop", "renormalise", "label", "ghost", "uniform", "decoupled"]
Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Form = Literal["forward_kl", "decoupled", "reverse_kl", "jensen_shannon"]
"""How student and target are compared: by KL as the kernels finish it, or over kept ids and one bucket (`coarse`)."""
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
        divergence: what is minimised; other ones than "forward_kl" compare the kept ids and one bucket of all others,
            so with residual "ghost" at temperature 1, and only targets that were cut off, not sampled.
        tail_weight: with residual "decoupled", weight of the term that tells kept ids from all others.
        token_weighting: "teacher_confidence" multiplies a position's divergence by its target's largest probability.
        logit_cap: the model's logits are c tanh(z / c) of what it is given; 0 for z itself.

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
    divergence: Divergence = "forward_kl"
    tail_weight: float = 1.0
    token_weighting: TokenWeighting = "none"
    logit_cap: float = 0.0

    def __post_init__(self) -> None:
        for name in TERMS.values():
            self._require(name, "at least 0", getattr(self, name) >= 0)
        self._require("temperature", "more than 0", self.temperature > 0)
        self._require("smoothing", "at least 0 and less than 1", 0 <= self.smoothing < 1)
        self._require("tail_weight", "at least 0", self.tail_weight >= 0)
        self._require("logit_cap", "at least 0", self.logit_cap >= 0)
        divergences = get_args(Divergence)
        self._require("divergence", ", ".join(divergences), self.divergence in divergences)
        if self.divergence != "forward_kl":
            of = f" with divergence {self.divergence}"
            self._require("residual", f"ghost{of}", self.residual == "ghost")
            self._require("temperature", f"1{of}", self.temperature == 1.0)
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
    def form(self) -> Form:
        """How student and target are compared."""
        return "decoupled" if self.residual == "decoupled" else self.divergence

    @property
    def numbers(self) -> list[float]:
        """The settings that are numbers or switches, in the order of the fields, as operations of torch take them."""
        return [float(getattr(self, name)) for name in _NUMBERS]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> LossSettings:
        """Return the settings with these `numbers`.

        The others, which tell how targets are prepared, are the defaults.
        """
        given = zip(_NUMBERS, numbers, strict=True)
        return cls(**{name: _NUMBERS[name](value) for name, value in given})  # type: ignore[arg-type]

    @property
    def kd_scale(self) -> float:
        """What multiplies every position's divergence: kd_weight, times tau^2 where asked for."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)


_TYPES: dict[object, type[float] | type[bool]] = {"float": float, "bool": bool}
_NUMBERS = {
    field.name: _TYPES[field.type] for field in fields(LossSettings) if field.type in _TYPES
}


class LossKeywords(TypedDict, total=False):
    """The fields of `LossSettings` as keywords of a function."""

    ce_weight: float
    kd_weight: float
    temperature: float
    temperature_squared: bool
    residual: Residual
    smoothing: float
    z_loss: float
    divergence: Divergence
    tail_weight: float
    token_weighting: TokenWeighting
    logit_cap: float
