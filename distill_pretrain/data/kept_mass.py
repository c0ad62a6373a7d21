"""How much of the teacher's distribution cut-off targets (top-k, top-p) keep, and what leaving out the rest costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill_pretrain.contracts import RaggedTargets

LOW_MASS = 0.9
"""A mean kept mass below this is a warning."""


@dataclass
class KeptShare:
    """What some positions with targets keep.

    Attributes:
        positions: how many.
    """

    positions: int = 0
    _mass: float = 0.0
    _bias: float = 0.0

    def add(self, targets: RaggedTargets) -> None:
        """Take more positions into account; those without a target do not count."""
        lengths = targets.entries_per_token[targets.entries_per_token > 0]
        if not len(lengths):
            return
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        mass = np.add.reduceat(targets.probs().astype(np.float64), starts)
        self.positions += len(mass)
        self._mass += float(mass.sum())
        self._bias -= float(np.log(mass).sum())

    @property
    def mean(self) -> float:
        """The mean mass of a position's targets, 0 to 1."""
        return self._mass / self.positions

    @property
    def bias(self) -> float:
        """The divergence in nats from what is kept, scaled to 1, to the teacher: the mean of -ln mass."""
        return max(0.0, self._bias / self.positions)

    @property
    def is_low(self) -> bool:
        """Whether so little is kept that the user is warned."""
        return self.mean < LOW_MASS
