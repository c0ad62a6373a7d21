"""What the loss of some tokens is: labels, targets and settings, as both backends take them.

Shapes: T tokens, K kept entries, V real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from distill_pretrain.kernels.cuda.backend import Backend
from distill_pretrain.kernels.sparse_kd.settings import Form, LossSettings
from distill_pretrain.kernels.sparse_kd.targets import RowTargets


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of some tokens, as both backends take it; the formulas are in README.md.

    Attributes:
        labels: int64[T], negative where there is none.
        targets: of the KL; None for K = 0.
        kd_scale: fp32[T], weight of the KL with tau^2 and token weight in it; given with targets.
        vocab_size: V.
        settings: the rest; what they say of targets is in `targets` and `kd_scale` already.
        group: name of the process group over which the columns are split in rank order; None for whole rows.
        form: how student and targets are compared; all but "forward_kl" need targets with a bucket.
        backend: what computes it, forward and backward; the same on all ranks of the group, whose collectives depend
            on it.
    """

    labels: torch.Tensor
    targets: RowTargets | None
    kd_scale: torch.Tensor | None
    vocab_size: int
    settings: LossSettings
    group: str | None
    backend: Backend
    form: Form = "forward_kl"

    @property
    def row_temperature(self) -> float:
        """The temperature at which whole rows are read; over kept ids and a bucket only kept ids have another."""
        return self.settings.temperature if self.form == "forward_kl" else 1.0

    @property
    def num_entries(self) -> int:
        """K, the number of target entries of a row."""
        return 0 if self.targets is None else self.targets.ids.size(-1)

    def rows(self, rows: slice[int]) -> Loss:
        """Return the loss of some of the tokens."""

        def part(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[rows]

        targets = self.targets
        if targets is not None:
            targets = RowTargets(
                ids=targets.ids[rows],
                probs=targets.probs[rows],
                floor=part(targets.floor),
                bucket=part(targets.bucket),
            )
        return replace(
            self, labels=self.labels[rows], targets=targets, kd_scale=part(self.kd_scale)
        )
