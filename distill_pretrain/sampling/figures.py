"""How a teacher's distributions look, from a few of the rows that are sampled anyway."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

LOOK_EVERY = 8
"""Every so many of the sampled rows is looked at: a figure over thousands of positions needs no more, and it costs an
eighth of two passes over the logits."""

NEARLY_UNIFORM = 0.98
"""Entropy, as a share of log V, above which a distribution counts as uniform."""


class DistributionFigures:
    """Sums over the rows that were looked at.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._entropies: list[npt.NDArray[np.float64]] = []
        self._top_ids: list[npt.NDArray[np.int32]] = []

    def add(self, entropies: npt.NDArray[np.float64], top_ids: npt.NDArray[np.int32]) -> None:
        """Add some more rows.

        Args:
            entropies: float64[T], in nats.
            top_ids: int32[T], the likeliest id, the lowest of equals.
        """
        self._entropies.append(entropies)
        self._top_ids.append(top_ids)

    @property
    def entropy(self) -> float:
        """The mean entropy in nats; nan where no row was looked at."""
        return float(np.concatenate(self._entropies).mean()) if self._entropies else math.nan

    @property
    def uniform_share(self) -> float:
        """The share of the rows that are nearly uniform."""
        if not self._entropies:
            return math.nan
        level = NEARLY_UNIFORM * math.log(self._vocab_size)
        return float((np.concatenate(self._entropies) > level).mean())

    @property
    def top_share(self) -> float:
        """The share of the rows that have the commonest likeliest id."""
        if not self._top_ids:
            return math.nan
        return float(np.bincount(np.concatenate(self._top_ids)).max()) / sum(
            map(len, self._top_ids)
        )
