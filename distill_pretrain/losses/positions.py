"""Which positions learn from the teacher: all, or the uncertain ones; the others learn their label in its place.

Shapes: B sequences, L positions, T = L * B tokens in the order of megatron-core's logits [L, B], K kept entries,
n this rank's real columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distill_pretrain.contracts import NO_ENTRY, SparseTargets
from distill_pretrain.kernels.sparse_kd.cap import soft_capped
from distill_pretrain.losses.config import ObjectiveConfig, Positions

CHUNK_ELEMENTS = 1 << 22
"""Elements of each temporary [rows, n]; at any time there are about three."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A rule for the positions that learn from the teacher.

    Attributes:
        by: "student_entropy" takes a share of each sequence, so that no layout decides; "teacher_entropy" all above a
            threshold.
        share: of a sequence's positions, rounded up.
        threshold: in nats.
    """

    by: Positions
    share: float
    threshold: float

    @classmethod
    def of(cls, config: ObjectiveConfig) -> Selection | None:
        """Return the rule of a recipe; None where all positions learn from the teacher."""
        if config.positions == "all":
            return None
        return cls(
            by=config.positions, share=config.position_share, threshold=config.entropy_threshold
        )

    def chosen(self, entropies: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Choose among positions of whole sequences.

        Args:
            entropies: fp32[L, B], of the student or the teacher.
            candidates: bool[L, B], positions that have a label and a target.

        Returns:
            bool[L, B].
        """
        if self.by == "teacher_entropy":
            return candidates & (entropies > self.threshold)
        ranked = entropies.masked_fill(~candidates, -math.inf)
        # Of equal ones the earlier.
        order = ranked.sort(dim=0, descending=True, stable=True).indices
        counts = (candidates.sum(0) * self.share).ceil()
        is_first = torch.arange(len(ranked), device=ranked.device).unsqueeze(-1) < counts
        return torch.zeros_like(candidates).scatter_(0, order, is_first) & candidates


def row_entropies(
    logits: torch.Tensor, group: dist.ProcessGroup | None, *, cap: float = 0.0
) -> torch.Tensor:
    """Compute the entropy of softmax(logits, capped) in nats, fp32[T], from this rank's real columns [T, n].

    In plain PyTorch on any device; with a group, every rank of it calls this, and gets the same numbers.
    """
    largest = logits.new_full((len(logits),), -math.inf, dtype=torch.float32)
    if logits.size(-1):
        largest = soft_capped(logits.amax(-1), cap)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = largest.new_zeros(2, len(logits))
    size = max(1, CHUNK_ELEMENTS // max(1, logits.size(-1)))
    for first in range(0, len(logits), size):
        rows = slice(first, first + size)
        shifted = soft_capped(logits[rows], cap) - largest[rows].unsqueeze(-1)
        weights = shifted.exp()
        sums[0, rows] = weights.sum(-1)
        # exp(s) s, where 0 times -inf is 0.
        sums[1, rows] = weights.mul_(shifted.clamp_(min=torch.finfo(torch.float32).min)).sum(-1)
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1] / sums[0]


def target_entropies(targets: SparseTargets) -> torch.Tensor:
    """Compute the entropy of cut-off targets in nats, fp32[T], what they lack taken as one more id.

    That is at most the teacher's own entropy.
    """
    rest = (1.0 - targets.probs.sum(-1)).clamp(min=0.0)
    entropies: torch.Tensor = torch.special.entr(targets.probs).sum(-1) + torch.special.entr(rest)
    return entropies


def with_labels_elsewhere(
    targets: SparseTargets, labels: torch.Tensor, chosen: torch.Tensor
) -> SparseTargets:
    """Put the label in the place of the target where a position is not chosen: the KL to it is the cross-entropy.

    Args:
        targets: [T, K], K at least 1.
        labels: int64[T], negative where there is none: nor is there a target then.
        chosen: bool[T].
    """
    elsewhere = ~chosen.unsqueeze(-1)
    ids = targets.ids.masked_fill(elsewhere, NO_ENTRY)
    probs = targets.probs.masked_fill(elsewhere, 0.0)
    has_label = ~chosen & (labels >= 0)
    ids[:, 0] = torch.where(has_label, labels, ids[:, 0])
    probs[:, 0] = torch.where(has_label, 1.0, probs[:, 0])
    return SparseTargets(ids=ids, probs=probs)
