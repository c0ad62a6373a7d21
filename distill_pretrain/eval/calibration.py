"""Calibration of the likeliest token: how often it is right when the model gives it probability c.

Shapes: T positions, M bins of equal width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

COLUMNS = ("positions", "confidence", "hits")
"""What is summed in every bin."""

_UNIT = float(1 << 24)


def bin_sums(confidence: torch.Tensor, hits: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Sums of `COLUMNS` in M bins ((m-1)/M, m/M] of the confidence.

    The confidence is rounded to a multiple of 2^-24, so that sums are exact in float64 up to 2^29 positions: states
    add up to the same numbers in any order, over any batches and ranks.

    Args:
        confidence: float[T], probability of the likeliest token.
        hits: bool[T], whether it is the true one.
        num_bins: M.

    Returns:
        float64[M, 3], on the device of the arguments.
    """
    exact = confidence.double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=exact.device)
    places = (torch.bucketize(exact, edges) - 1).clamp(0, num_bins - 1)
    rounded = (exact * _UNIT).round() / _UNIT
    terms = torch.stack((torch.ones_like(exact), rounded, hits.double()), dim=1)
    return exact.new_zeros(num_bins, len(COLUMNS)).index_add_(0, places, terms)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Sums of `bin_sums` over all positions.

    Attributes:
        sums: float64[M, 3].
    """

    sums: npt.NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: sum_m (n_m / n) |accuracy_m - confidence_m| (Guo et al. 2017, eq. 3)."""
        positions, confidence, hits = self.sums.T
        return float(np.abs(hits - confidence).sum() / positions.sum())

    def as_dict(self) -> dict[str, list[Any]]:
        """Return the reliability diagram as JSON values.

        Returns:
            bins: M + 1 edges; positions: M counts; confidence and accuracy: M means, None in an empty bin.
        """
        positions, confidence, hits = self.sums.T
        return {
            "bins": np.linspace(0, 1, len(self.sums) + 1).tolist(),
            "positions": [round(count) for count in positions.tolist()],
            "confidence": _means(confidence, positions),
            "accuracy": _means(hits, positions),
        }


def _means(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]
