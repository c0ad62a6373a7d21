"""Cached targets on their way to the device: as they are stored, without padding; the device pads them.

Shapes: B sequences, P positions, T = B * P, K the most entries of a position, E entries in all, N draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill_pretrain.contracts import IGNORED_LABEL, NO_ENTRY, RaggedTargets, SparseTargets

_MOST_OF_A_BYTE = 255


@dataclass(frozen=True, kw_only=True)
class PackedTargets:
    """Targets of the positions of a micro-batch, packed.

    Attributes:
        most: K.
        entries_per_token: int32[B, P].
        ids: int32[E].
        values: fp32[E] probabilities; or draw counts, uint8[E] or int16[E], that `table` makes probabilities of.
        table: fp32[N + 1], probability of each count; None beside probabilities.
    """

    most: int
    entries_per_token: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[RaggedTargets], *, rows: int) -> PackedTargets:
        """Pack the targets of B * P consecutive positions, in any pieces and of any kinds; `rows` is B.

        Where all are counts of as many draws they stay counts.
        """
        entries = np.concatenate([part.entries_per_token for part in parts])
        kinds = {(part.kind, part.num_draws) for part in parts}
        kind, num_draws = next(iter(kinds))
        values = np.concatenate([part.values for part in parts])
        table = None
        if len(kinds) == 1 and kind == "counts" and values.max(initial=0) <= num_draws:
            values = values.astype(np.uint8 if num_draws <= _MOST_OF_A_BYTE else np.int16)
            table = np.arange(num_draws + 1, dtype=np.float32) / np.float32(num_draws)
        else:
            values = np.concatenate([part.probs() for part in parts])
        return cls(
            most=max(1, int(entries.max())),
            entries_per_token=torch.from_numpy(entries.reshape(rows, -1)),
            ids=torch.from_numpy(np.concatenate([part.ids for part in parts])),
            values=torch.from_numpy(values),
            table=None if table is None else torch.from_numpy(table),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that travels."""
        some = [self.entries_per_token, self.ids, self.values]
        return some if self.table is None else [*some, self.table]

    def pinned(self) -> PackedTargets:
        """Copy them into page-locked memory."""
        return PackedTargets(
            most=self.most,
            entries_per_token=self.entries_per_token.pin_memory(),
            ids=self.ids.pin_memory(),
            values=self.values.pin_memory(),
            table=None if self.table is None else self.table.pin_memory(),
        )

    def to(self, device: torch.device, labels: torch.Tensor) -> SparseTargets:
        """Copy them to the device, and pad them there; the host waits for nothing.

        Args:
            device: where they go.
            labels: integer[B, P] on the device; a position without one has no target, such as those that the loss
                leaves out.
        """

        def moved(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        lengths = moved(self.entries_per_token).flatten().long()
        values = moved(self.values)
        probs = values
        if self.table is not None:
            probs = moved(self.table).index_select(0, values.int())
        # Entry e of position t goes to place t * K + e - (number of the first entry of t).
        gaps = torch.arange(len(lengths), device=device) * self.most - (lengths.cumsum(0) - lengths)
        places = gaps.repeat_interleave(lengths, output_size=len(self.ids))
        places += torch.arange(len(self.ids), device=device)
        size = len(lengths) * self.most
        shape = (*self.entries_per_token.shape, self.most)
        without = (labels == IGNORED_LABEL)[..., None]
        ids = torch.full((size,), NO_ENTRY, dtype=torch.int64, device=device)
        ids = ids.scatter_(0, places, moved(self.ids).long()).view(shape)
        spread = torch.zeros(size, dtype=torch.float32, device=device)
        spread = spread.scatter_(0, places, probs).view(shape)
        return SparseTargets(
            ids=ids.masked_fill_(without, NO_ENTRY), probs=spread.masked_fill_(without, 0.0)
        )
