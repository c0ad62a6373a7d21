"""How far kept targets are from the teacher: sums over positions, and the figures they give.

A deterministic layout is wrong in the same way every time: its squared bias is its squared error. A sampler's squared
error is nearly all variance; its squared bias is estimated from several seeds at some positions, the variance of their
mean taken off, so that it scatters around the truth on both sides of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


def squared_bias(draws: Sequence[Float64Array], truth: Float64Array) -> Float64Array:
    """float64[T]: unbiased estimate of ||E draw - truth||^2 from two or more independent draws, each [T, V]."""
    count = len(draws)
    mean: Float64Array = np.add.reduce(draws) / count
    spread = sum(((draw - mean) ** 2).sum(axis=1) for draw in draws) / (count - 1)
    estimate: Float64Array = ((mean - truth) ** 2).sum(axis=1) - spread / count
    return estimate


@dataclass
class Deviation:
    """Squared errors of a vector per position, and squared biases where they were estimated."""

    errors: list[Float64Array] = field(default_factory=list)
    biases: list[Float64Array] = field(default_factory=list)

    def add(self, found: Float64Array, truth: Float64Array) -> None:
        """Take one vector per position, float64[T, V], into account."""
        self.errors.append(((found - truth) ** 2).sum(axis=1))

    def figures(self) -> dict[str, float]:
        """Means over positions; the standard error of an estimated bias is beside it."""
        errors = np.concatenate(self.errors)
        result = {"squared_error": float(errors.mean())}
        if not self.biases:
            return result | {"squared_bias": result["squared_error"]}
        biases = np.concatenate(self.biases)
        return result | {
            "squared_bias": float(biases.mean()),
            "squared_bias_standard_error": float(biases.std(ddof=1) / np.sqrt(len(biases))),
        }


@dataclass
class LayoutSums:
    """What accumulates of one layout."""

    target: Deviation = field(default_factory=Deviation)
    gradient: Deviation = field(default_factory=Deviation)
    truth: list[Float64Array] = field(default_factory=list)
    mass: float = 0.0
    entries: int = 0
    positions: int = 0

    def add(
        self,
        kept: Float64Array,
        implied: Float64Array,
        teacher: Float64Array,
        student: Float64Array,
    ) -> None:
        """Of some positions: the kept probabilities, the target the loss implies, both models; float64[T, V] each."""
        self.target.add(kept, teacher)
        self.gradient.add(student - implied, student - teacher)
        self.truth.append(((student - teacher) ** 2).sum(axis=1))
        self.mass += float(kept.sum())
        self.entries += int(np.count_nonzero(kept))
        self.positions += len(kept)

    def figures(self) -> dict[str, object]:
        """JSON-able."""
        return {
            "entries_per_token": self.entries / self.positions,
            "kept_mass": self.mass / self.positions,
            "target": self.target.figures(),
            "gradient": self.gradient.figures(),
            "gradient_squared": float(np.concatenate(self.truth).mean()),
        }
