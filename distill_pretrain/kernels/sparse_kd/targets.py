"""From cached targets to what the loss compares the student with: temperature, residual mass, smoothing.

The maths is in README.md beside this file. Nothing here is as large as the vocabulary.

Shapes: T tokens, K kept entries, V real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill_pretrain.contracts import NO_ENTRY, SparseTargets
from distill_pretrain.kernels.sparse_kd.settings import LossSettings

MASS_ROUNDING = 1e-6
"""A row whose mass is this close to 1 lacks nothing: sums of fp32 probabilities are no more exact."""


@dataclass(frozen=True, kw_only=True)
class RowTargets:
    """The distribution of each row: probs at ids, plus `floor` at every id or `bucket` outside the ids as a whole.

    Attributes:
        ids: int64[T, K], distinct within a row, padded with -1.
        probs: fp32[T, K], zero where padded.
        floor: fp32[T], added to every id of the vocabulary; None for zero.
        bucket: fp32[T], mass of all ids that are not in `ids` taken together; None where the mode has no bucket. Not
            beside a floor.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    floor: torch.Tensor | None = None
    bucket: torch.Tensor | None = None

    @property
    def kept(self) -> torch.Tensor:
        """Where there is an id, bool[T, K]."""
        return self.ids >= 0


def prepare_targets(
    targets: SparseTargets,
    labels: torch.Tensor,
    settings: LossSettings,
    *,
    vocab_size: int,
) -> RowTargets:
    """Apply temperature, then the residual mode, then smoothing. A row without mass stays without a target.

    Args:
        targets: ids int64[T, K] padded with -1, probs fp32[T, K].
        labels: int64[T]; negative means no label.
        settings: the temperature tau, by which t_i becomes t_i^(1/tau), rescaled to the row's mass; what becomes of
            the residual R = 1 - sum_i t_i; the smoothing a, by which the target becomes (1 - a) t + a / V.
        vocab_size: V.
    """
    temperature, residual, smoothing = settings.temperature, settings.residual, settings.smoothing
    if residual == "decoupled":
        # The temperature is that of the kept ids among themselves, which `coarse` applies.
        temperature, residual = 1.0, "ghost"
    ids, probs = targets.ids, targets.probs
    mass = probs.sum(-1)
    if temperature != 1.0:
        probs = _tempered(probs, mass, temperature)
    if residual == "drop" and smoothing == 0.0:
        return RowTargets(ids=ids, probs=probs)
    missing = 1.0 - mass
    missing = torch.where((missing > MASS_ROUNDING) & (mass > 0), missing, 0.0)
    floor = bucket = None
    if residual == "renormalise":
        probs = probs / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    elif residual == "label":
        ids, probs = _given_to_label(ids, probs, labels, missing)
    elif residual == "ghost":
        bucket = torch.where((ids >= 0).sum(-1) < vocab_size, missing, 0.0)
    elif residual == "uniform":
        floor = missing / vocab_size
    if smoothing:
        share = torch.where(mass > 0, smoothing / vocab_size, 0.0)
        kept = ids >= 0
        probs = probs * (1.0 - smoothing)
        if bucket is None:
            floor = share if floor is None else (1.0 - smoothing) * floor + share
        else:
            probs = probs + torch.where(kept, share.unsqueeze(-1), 0.0)
            bucket = (1.0 - smoothing) * bucket + share * (vocab_size - kept.sum(-1))
    return RowTargets(ids=ids, probs=probs, floor=floor, bucket=bucket)


def confidence(targets: SparseTargets) -> torch.Tensor:
    """Return the largest probability of each row as stored, fp32[T]; 0 without targets."""
    return targets.probs.amax(-1)


def _tempered(probs: torch.Tensor, mass: torch.Tensor, temperature: float) -> torch.Tensor:
    tiny = torch.finfo(probs.dtype).tiny
    # Relative to the largest, which then cannot underflow.
    largest = probs.amax(-1, keepdim=True).clamp(min=tiny)
    powers = (probs / largest) ** (1.0 / temperature)
    return powers * (mass / powers.sum(-1).clamp(min=tiny)).unsqueeze(-1)


def _given_to_label(
    ids: torch.Tensor, probs: torch.Tensor, labels: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `missing` at the label: to its entry, or in a new last column where it has none."""
    missing = torch.where(labels >= 0, missing, 0.0)
    at_label = (ids == labels.unsqueeze(-1)) & (ids >= 0)
    is_new = (missing > 0) & ~at_label.any(-1)
    probs = probs + torch.where(at_label, missing.unsqueeze(-1), 0.0)
    new_ids = torch.where(is_new, labels, NO_ENTRY)
    new_probs = torch.where(is_new, missing, 0.0)
    return torch.cat((ids, new_ids[:, None]), -1), torch.cat((probs, new_probs[:, None]), -1)
